"""The conformance kit: the contracts of every plugin of a package, as tests.

A plugin author's complete test file, for pytest::

    import pytest
    from transfer.testing import contracts

    CONTRACTS = contracts("transfer-mine", {"mine": {"width": 4}}, configs=["mine.yaml"])

    @pytest.mark.parametrize("contract", CONTRACTS, ids=str)
    def test_contract(contract):
        contract.check()

A failure names the plugin, the contract, the deviation, and the docstring that states the contract. The kit itself
does not need pytest: ``transfer plugins --check`` runs its quick contracts for all installed plugins.
"""

from transfer.testing.cases import Case, Contract, ContractError
from transfer.testing.suite import contracts, contracts_of

__all__ = ["Case", "Contract", "ContractError", "contracts", "contracts_of"]
