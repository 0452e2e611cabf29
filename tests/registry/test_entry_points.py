"""Plugins by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Dense, Install, Points

from transfer import PluginError, plugins, register
from transfer.builtin.heads import Linear
from transfer.registry import entry_points as registry

GOOD = """
from transfer import FeatureSpec, Head
from torch import nn

class Good(Head):
    def __init__(self, features, out_features, *, size: int = 1):
        super().__init__()
        self.output = nn.Linear(features.size, out_features)

    def forward(self, features):
        return self.output(features)

class Wrong:
    pass
"""


def test_the_parts_of_core_are_plugins_too() -> None:
    found = {(p.kind, p.name): p for p in plugins()}
    assert found["head", "linear"].distribution == "transferkit"
    assert found["task", "classification"].target == "transfer.builtin.tasks:Classification"
    assert registry.load("head", "linear") is Linear


def test_listing_imports_nothing() -> None:
    code = (
        "import sys, transfer; found = transfer.plugins();"
        "assert found; print([m for m in ('torch', 'numpy', 'pydantic', 'transfer.heads') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_plugins_are_listed_by_kind_and_name(tiny: None) -> None:
    found = plugins()
    assert found == sorted(found, key=lambda p: (registry.kinds().index(p.kind), p.name, p.distribution))
    assert {p.kind for p in plugins("head")} == {"head"}
    assert ("dense", "(registered)") in {(p.name, p.distribution) for p in plugins("backbone")}


def test_load_imports_only_one_plugin(install: Install) -> None:
    entries = {"transfer.heads": ["alpha = alpha_plugin:Good", "beta = beta_plugin:Good"]}
    install("two-heads", "1.2", entries, alpha_plugin=GOOD, beta_plugin=GOOD)
    assert {"alpha", "beta"} <= {p.name for p in plugins("head")}
    assert not {"alpha_plugin", "beta_plugin"} & set(sys.modules)
    assert registry.load("head", "alpha").__module__ == "alpha_plugin"
    assert "beta_plugin" not in sys.modules


def test_name_claimed_twice_needs_qualified_name(install: Install) -> None:
    install("first-package", "1.0", {"transfer.heads": ["mine = first_plugin:Good"]}, first_plugin=GOOD)
    install("second-package", "2.0", {"transfer.heads": ["mine = second_plugin:Good"]}, second_plugin=GOOD)
    with pytest.raises(PluginError, match=r"first-package 1\.0 and second-package 2\.0") as caught:
        registry.load("head", "mine")
    assert caught.value.problems[0].available == ("first-package:mine", "second-package:mine")
    assert registry.load("head", "second-package:mine").__module__ == "second_plugin"
    assert "first_plugin" not in sys.modules


def test_a_distribution_found_twice_is_one(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("some-package", "1.0", {"transfer.heads": ["mine = mine_plugin:Good"]}, mine_plugin=GOOD)
    copy = tmp_path / "copy"
    copy.mkdir()
    for folder in tmp_path.glob("*.dist-info"):
        (copy / folder.name).mkdir()
        for file in folder.iterdir():
            (copy / folder.name / file.name).write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(copy)
    registry._entry_points.cache_clear()
    assert registry.find("head", "mine").distribution == "some-package"


def test_unknown_name_lists_available_and_nearest() -> None:
    with pytest.raises(PluginError, match="unknown head 'Linaer'") as caught:
        registry.find("head", "Linaer")
    (problem,) = caught.value.problems
    assert {"linear", "mlp"} <= set(problem.available)
    assert problem.fix == "did you mean 'linear'?"
    with pytest.raises(PluginError) as far:
        registry.find("head", "transformer_decoder")
    assert "install the package" in str(far.value.problems[0].fix)


def test_failing_import_does_not_affect_other_plugins(install: Install) -> None:
    entries = {"transfer.heads": ["broken = broken_plugin:Good", "whole = whole_plugin:Good"]}
    install("half-broken", "0.3", entries, broken_plugin="raise RuntimeError('no such device')", whole_plugin=GOOD)
    with pytest.raises(PluginError, match="RuntimeError: no such device") as caught:
        registry.load("head", "broken")
    assert isinstance(caught.value.__cause__, RuntimeError)
    (problem,) = caught.value.problems
    assert problem.where == "entry point broken = broken_plugin:Good of half-broken 0.3"
    assert "half-broken" in str(problem.fix)
    assert registry.load("head", "whole").__module__ == "whole_plugin"


@pytest.mark.parametrize("target", ["nowhere_plugin:Good", "empty_plugin:Missing", "bad_syntax_plugin:Good"])
def test_entry_point_without_target_is_plugin_error(install: Install, target: str) -> None:
    install("lost", "1", {"transfer.heads": [f"lost = {target}"]}, empty_plugin="", bad_syntax_plugin="def")
    with pytest.raises(PluginError, match="head 'lost' cannot be imported"):
        registry.load("head", "lost")


def test_a_plugin_of_the_wrong_class_is_refused(install: Install) -> None:
    entries = {"transfer.heads": ["wrong = wrong_plugin:Wrong"], "transfer.tasks": ["head = wrong_plugin:Good"]}
    install("confused", "1", entries, wrong_plugin=GOOD)
    with pytest.raises(PluginError, match=r"no subclass of transfer\.Head"):
        registry.load("head", "wrong")
    with pytest.raises(PluginError, match=r"no subclass of transfer\.Task"):
        registry.load("task", "head")


def test_a_class_with_missing_methods_is_refused() -> None:
    class Partial(Dense):
        pass

    Partial.__abstractmethods__ = frozenset({"features", "preprocessing"})
    with pytest.raises(PluginError, match="does not define features, preprocessing"):
        register("backbone", "partial")(Partial)


def test_registering_the_same_class_again_replaces_it() -> None:
    def define() -> Any:
        class Mine(Points):
            pass

        return Mine

    register("dataset", "mine")(define())
    again = register("dataset", "mine")(define())
    assert registry.load("dataset", "mine") is again


def test_register_refuses_taken_name() -> None:
    class First(Points):
        pass

    class Second(Points):
        pass

    register("dataset", "mine")(First)
    with pytest.raises(PluginError, match=r"already registered by .*First"):
        register("dataset", "mine")(Second)


def test_registered_class_takes_precedence_over_package() -> None:
    class Mine(Linear):
        pass

    register("head", "linear")(Mine)
    assert registry.load("head", "linear") is Mine
    assert registry.load("head", "transfer:linear") is Linear


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(PluginError, match="unknown kind of plugin 'callback'") as caught:
        register("callback", "mine")
    assert caught.value.problems[0].available == tuple(sorted(registry.kinds()))


def test_a_class_of_another_kind_cannot_be_registered() -> None:
    with pytest.raises(PluginError, match=r"no subclass of transfer\.Task"):
        register("task", "mine")(Points)


NET = """
class Speller:
    def spell(self): ...

class Loud(Speller):
    pass
"""


def test_kind_declared_by_plugin(install: Install) -> None:
    install("speller", "1", {"transfer.kinds": ["speller = speller_base:Speller"]}, speller_base=NET)
    loud = {"transfer.spellers": ["loud = speller_base:Loud"], "transfer.heads": ["not_loud = speller_base:Loud"]}
    install("loud-speller", "2", loud)
    assert registry.kinds()[:4] == registry.KINDS
    assert "speller" in registry.kinds()
    assert [(p.name, p.distribution) for p in plugins("speller")] == [("loud", "loud-speller")]
    assert registry.load("speller", "loud").__name__ == "Loud"
    with pytest.raises(PluginError, match=r"no subclass of speller_base\.Speller"):
        register("speller", "points")(Points)


def test_plural_of_kind_ending_in_s() -> None:
    assert registry._group("vectors") == "transfer.vectors"
    assert registry._group("tokenizer") == "transfer.tokenizers"


def test_kind_declared_twice_is_refused_on_use(install: Install) -> None:
    install("first-speller", "1", {"transfer.kinds": ["accent = accent_base:Speller"]}, accent_base=NET)
    install("second-speller", "2", {"transfer.kinds": ["accent = other_accent_base:Speller"]}, other_accent_base=NET)
    assert registry.kinds().count("accent") == 1
    with pytest.raises(PluginError, match=r"kind 'accent' is claimed by first-speller 1 and second-speller 2"):
        register("accent", "mine")(Points)


# ---------------------------------------------------------------------------------------- what a plugin's package needs


def unavailable(name: str) -> tuple[str, str | None]:
    problem = registry.find("head", name).unavailable
    assert problem is not None
    return problem.message, problem.fix


def test_missing_extra_makes_plugin_unavailable(install: Install) -> None:
    requires = ["nowhere-to-be-found>=2; extra == 'night'", "transferkit"]
    entries = {"transfer.heads": ["owl = owl_plugin:Good [night]", "lark = owl_plugin:Good"]}
    install("birds", "1.0", entries, requires=requires, owl_plugin=GOOD)
    owl = registry.find("head", "owl")
    assert (owl.target, owl.extras, owl.requirement) == ("owl_plugin:Good", ("night",), "birds[night]==1.0")
    message, fix = unavailable("owl")
    assert message == "it needs nowhere-to-be-found>=2, which is not installed"
    assert fix == "pip install 'birds[night]'"
    with pytest.raises(PluginError, match="head 'owl' cannot be loaded: it needs nowhere-to-be-found") as caught:
        registry.load("head", "owl")
    assert caught.value.problems[0].fix == fix
    assert "owl_plugin" not in sys.modules
    assert registry.find("head", "lark").unavailable is None
    assert registry.load("head", "lark").__module__ == "owl_plugin"


def test_extra_with_other_version_suggests_separate_environment(install: Install) -> None:
    requires = [
        "numpy<1.0; extra == 'old'",
        "rich>1; extra == 'old'",
        "torch<0.1; python_version < '3' and extra == 'old'",
    ]
    install(
        "relics", "3", {"transfer.heads": ["relic = relic_plugin:Good [old]"]}, requires=requires, relic_plugin=GOOD
    )
    message, fix = unavailable("relic")
    assert message.startswith("it needs numpy<1.0, and ")
    assert message.endswith(" is installed")
    assert message.count("installed") == 1  # rich is there, and the marker of torch does not hold
    assert fix == "pip install 'relics[old]' in a separate environment"


def test_missing_requirement_makes_plugin_unavailable(install: Install) -> None:
    entries = {"transfer.heads": ["bare = bare_plugin:Good"]}
    install("bare-package", "1", entries, requires=["surely-not-installed", "numpy<1.0"], bare_plugin=GOOD)
    message, fix = unavailable("bare")
    assert message == "it needs surely-not-installed, which is not installed"  # another version may well do
    assert fix == "pip install bare-package"


def test_requirements_of_another_time_are_passed_over(install: Install) -> None:
    entries = {"transfer.heads": ["ancient = ancient_plugin:Good"]}
    install("ancient-package", "1", entries, requires=["pytz (>dev)"], ancient_plugin=GOOD)
    assert registry.find("head", "ancient").unavailable is None
