"""The conformance kit: every contract of every plugin of a package, as tests.

A plugin author's whole test file, run with pytest::

    import pytest
    from transfer.testing import contracts

    CONTRACTS = contracts("transfer-mine", {"mine": {"width": 4}}, configs=["mine.yaml"])

    @pytest.mark.parametrize("contract", CONTRACTS, ids=str)
    def test_contract(contract):
        contract.check()

A failure names the plugin, the contract, what was found, and where the contract is written. The kit itself needs no
pytest: ``transfer plugins --check`` runs its quick part over everything that is installed.
"""

from transfer.testing.cases import Case, Contract, ContractError
from transfer.testing.suite import contracts, contracts_of

__all__ = ["Case", "Contract", "ContractError", "contracts", "contracts_of"]
