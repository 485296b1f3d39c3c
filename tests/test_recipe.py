"""The recipe: what is written down is what runs, and a mistake is named before anything does."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from scalemerge.data.sources import resolve_path
from scalemerge.errors import InputError
from scalemerge.recipe import Joint, Loss, Recipe, Training, dump_recipe, load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))
MINIMAL = {"name": "x", "base": {"path": "b"}, "tasks": {"a": {"kind": "pairs", "sources": [{"path": "p"}]}}}


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCALEMERGE_DATA", raising=False)


def changed(path: str, value: object) -> dict:
    """MINIMAL with one entry, `a.0.b` style, set."""
    made = yaml.safe_load(yaml.safe_dump(MINIMAL))
    *parents, last = path.split(".")
    at = made
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
    at[last] = value
    return made


def write(folder: Path, content: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def refused(path: Path, *parts: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for part in parts:
        assert part in message, message
    return message


# ---- what is good ------------------------------------------------------------------------------------------------


def test_both_recipes_are_there() -> None:
    assert {"docs.yaml", "shared-suite.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes(path: Path, tmp_path: Path) -> None:
    """They load, have what an honest comparison needs, and survive being written out."""
    from scalemerge.objectives import check_parameters

    recipe = load_recipe(path, data="/somewhere")
    assert len(recipe.tasks) >= 3
    assert {0.5, 1.0} <= {joint.alpha for joint in recipe.joint.values()}
    assert {"average", "task_arithmetic", "self_positioning"} <= {merge.method for merge in recipe.merges}
    for name, task in recipe.tasks.items():
        check_parameters(task.loss.name, task.loss.parameters, name)
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def defaults_of(model: BaseModel, path: str = "") -> list[str]:
    return [f"{path}{field.alias or name}" for name, field in type(model).model_fields.items()]


def test_every_default_is_written_out() -> None:
    recipe = Recipe(**MINIMAL)
    written = yaml.safe_load(dump_recipe(recipe))

    def check(model: BaseModel, at: dict) -> None:
        assert set(at) == set(defaults_of(model))
        for name in type(model).model_fields:
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                check(value, at[name])

    check(recipe, written)
    check(recipe.tasks["a"], written["tasks"]["a"])
    check(recipe.tasks["a"].sources[0], written["tasks"]["a"]["sources"][0])
    assert written["training"]["learning_rate"] == 5e-5
    assert [merge["method"] for merge in written["merges"]] == ["average", "task_arithmetic", "self_positioning"]
    assert Recipe(**written) == recipe


TEXTS = st.text(min_size=1, max_size=9, alphabet=st.characters(codec="utf-8"))
NAMES = st.text("abcdefgh-_0123456789", min_size=1, max_size=8)
LOSSES = {
    "pairs": "infonce",
    "triplets": "infonce",
    "retrieval": "infonce",
    "scored_pairs": "cosent",
    "labelled_texts": "supcon",
}


@st.composite
def recipes(draw: st.DrawFn) -> dict:
    def optional(**strategies: st.SearchStrategy) -> dict:
        return {name: draw(strategy) for name, strategy in strategies.items() if draw(st.booleans())}

    tasks = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)):
        kind = draw(st.sampled_from(list(LOSSES)))
        tasks[name] = {
            "kind": kind,
            "sources": [
                {
                    "path": draw(TEXTS),
                    **optional(
                        limit=st.integers(1, 9),
                        split=NAMES,
                        where=st.dictionaries(NAMES, st.lists(st.integers() | NAMES)),
                    ),
                }
            ],
            **optional(
                prompts=st.fixed_dictionaries({"query": TEXTS}),
                loss=st.just({"name": LOSSES[kind], "parameters": {"temperature": 0.1}}),
                weight=st.floats(0.1, 9),
                cap=st.integers(1, 99),
                training=st.just({"epochs": 2}),
            ),
        }
    return {
        "name": draw(NAMES),
        "base": {
            "path": draw(NAMES),
            **optional(pooling=st.sampled_from(["cls", "mean", "last"]), normalize=st.booleans()),
        },
        "tasks": tasks,
        **optional(
            seed=st.integers(0, 2**40),
            training=st.fixed_dictionaries(
                {"learning_rate": st.floats(1e-9, 1), "schedule": st.sampled_from(["cosine"])}
            ),
            joint=st.dictionaries(NAMES, st.fixed_dictionaries({"alpha": st.floats(0, 3)}), max_size=2),
            positioning=st.fixed_dictionaries({"mu": st.floats(0, 1), "start": st.just([0.5] * len(tasks))}),
            merges=st.just([{"method": "task_arithmetic", "parameters": {"lambda": 0.4}, "name": "ta"}]),
        ),
    }


@given(raw=recipes())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_dump_and_load_round_trip(raw: dict, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, yaml.safe_dump(raw, allow_unicode=True)))
    text = dump_recipe(recipe)
    again = load_recipe(write(tmp_path, text))
    assert again == recipe
    assert dump_recipe(again) == text
    for name, task in raw["tasks"].items():
        assert recipe.tasks[name].loss.name == LOSSES[task["kind"]], "the loss that fits the kind is written in"


def test_settings_of_one_task_lie_over_the_common_ones(tmp_path: Path) -> None:
    raw = changed("training", {"batch_size": 8, "epochs": 3})
    raw["tasks"]["a"]["training"] = {"epochs": 1}
    raw["joint"] = {"j": {"training": {"batch_size": 4}}}
    recipe = load_recipe(write(tmp_path, raw))
    assert recipe.training_of("a") == Training(batch_size=8, epochs=1)
    assert recipe.joint_training_of("j") == Training(batch_size=4, epochs=3)
    assert recipe.joint["j"] == Joint(training={"batch_size": 4})


def test_where_the_data_folder_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--data before SCALEMERGE_DATA before the recipe's own; without any, the message says how to give one."""
    path = write(tmp_path, changed("data", "recipe"))
    assert load_recipe(path).data == "recipe"
    monkeypatch.setenv("SCALEMERGE_DATA", "variable")
    assert load_recipe(path).data == "variable"
    assert load_recipe(path, data="option").data == "option"
    monkeypatch.delenv("SCALEMERGE_DATA")
    recipe = load_recipe(write(tmp_path, changed("tasks.a.sources.0.path", "{data}/x")))
    with pytest.raises(
        InputError, match=r"'\{data\}/x': \{data\} is not known; give --data DIR or set SCALEMERGE_DATA"
    ):
        resolve_path(recipe.tasks["a"].sources[0], recipe.data)


# ---- what is not -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "where", "nearest"),
    [
        ("taks", "", "tasks"),
        ("positionig", "", "positioning"),
        ("base.poolling", "base: ", "pooling"),
        ("training.learning_rat", "training: ", "learning_rate"),
        ("tasks.a.prompt", "tasks.a: ", "prompts"),
        ("tasks.a.prompts.queries", "tasks.a.prompts: ", "query"),
        ("tasks.a.sources.0.colums", "tasks.a.sources.0: ", "columns"),
        ("tasks.a.training.epoch", "tasks.a.training: ", "epochs"),
        ("joint.j.alfa", "joint.j: ", "alpha"),
        ("joint.j.training.epoch", "joint.j.training: ", "epochs"),
        ("probe.row_per_task", "probe: ", "rows_per_task"),
        ("positioning.granularty", "positioning: ", "granularity"),
        ("evaluation.limit", "evaluation: ", "limits"),
    ],
)
def test_unknown_keys_at_any_depth(path: str, where: str, nearest: str, tmp_path: Path) -> None:
    key = path.rsplit(".", 1)[-1]
    refused(write(tmp_path, changed(path, 1)), f": {where}unknown key '{key}'; did you mean '{nearest}'?")


def test_an_unknown_key_like_no_other_lists_them_all(tmp_path: Path) -> None:
    refused(write(tmp_path, changed("probe.zzz", 1)), "unknown key 'zzz'; known keys: rows_per_task, seed, validation_")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("name", 3, "name: "),
        ("name", "a/b", "name: "),
        ("seed", "one", "seed: "),
        ("base", "path", "base: "),
        ("base.path", None, "base.path: "),
        ("base.pooling", "max", "base.pooling: "),
        ("base.max_length", 1, "base.max_length: "),
        ("tasks", [], "tasks: "),
        ("tasks", {}, "tasks: "),
        ("tasks", {"a/b": MINIMAL["tasks"]["a"]}, "tasks: 'a/b' must be usable as a folder name"),
        ("tasks", {"..": MINIMAL["tasks"]["a"]}, "tasks: '..' must be"),
        ("tasks", {"a\n": MINIMAL["tasks"]["a"]}, "must be usable as a folder name"),
        ("tasks.a.kind", "pair", "tasks.a.kind: "),
        ("tasks.a.sources", [], "tasks.a.sources: "),
        ("tasks.a.sources", None, "tasks.a.sources: "),
        ("tasks.a.sources.0.limit", 0, "tasks.a.sources.0.limit: "),
        ("tasks.a.sources.0.window", 1, "tasks.a.sources.0.window: Input should be greater than or equal to 2"),
        ("tasks.a.loss", {"name": "cosent"}, "tasks.a: loss 'cosent' does not fit kind 'pairs'; use 'infonce'"),
        ("tasks.a.loss", {"name": "triplet"}, "tasks.a.loss.name: "),
        ("tasks.a.weight", 0, "tasks.a.weight: "),
        ("tasks.a.training", {"epochs": "many"}, "tasks.a.training: epochs: "),
        ("training.learning_rate", -1, "training.learning_rate: "),
        ("training.learning_rate", float("nan"), "training.learning_rate: "),
        ("training.learning_rate", float("inf"), "training.learning_rate: "),
        ("training.batch_size", 1, "training.batch_size: "),
        ("training.batch_size", 2.5, "training.batch_size: "),
        ("training.engine", "zero4", "training.engine: "),
        ("joint.half", {"alpha": -0.5}, "joint.half.alpha: "),
        ("joint.half", {"alpha": float("inf")}, "joint.half.alpha: "),
        ("joint.half", {"weights": {"b": 1}}, "joint.half.weights names 'b', which is no task"),
        ("joint", {"../x": {}}, "joint: '../x' must be usable as a folder name"),
        ("positioning.order", ["b"], "positioning.order must name each task once: a"),
        ("positioning.order", ["a", "a"], "positioning.order must name each task once: a"),
        ("positioning.start", [0.5, 0.5], "positioning.start needs one coefficient per task, 1 in all"),
        ("positioning.start", [float("nan")], "positioning.start.0: "),
        ("positioning.mu", -1, "positioning.mu: "),
        ("merges", [{"method": "average"}, {"method": "average"}], "merges: 'average' appears twice"),
        ("merges", [{"method": "average", "name": "../../x"}], "merges: '../../x' must be usable as a folder name"),
        ("merges", [{"method": "average", "dtype": "int8"}], "merges.0.dtype: "),
        ("evaluation.suite", "mteb", "evaluation.suite: "),
        ("evaluation.limits", {"max_rows": "few"}, "evaluation.limits.max_rows: "),
    ],
)
def test_wrong_values_name_the_field(path: str, value: object, expected: str, tmp_path: Path) -> None:
    refused(write(tmp_path, changed(path, value)), expected)


@pytest.mark.parametrize("key", ["name", "base", "tasks"])
def test_what_is_required(key: str, tmp_path: Path) -> None:
    refused(write(tmp_path, {name: value for name, value in MINIMAL.items() if name != key}), f"{key}: ")


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "text", "3", "null", "# only a comment\n"])
def test_no_mapping(content: str, tmp_path: Path) -> None:
    refused(write(tmp_path, content), "a recipe is a mapping of keys")


@pytest.mark.parametrize(
    "content",
    [
        "a: [1",
        "a: b: c",
        "\tname: x",
        "!!python/object:os.system x",
        "!!bool x",
        "!!int ''",
        "!!timestamp x",
        "a: &a {b: *c}",
        "? {a: 1}\n: 2",
        "a: 2001-99-99",
        "{" * 5000,
        "a: \x00",
    ],
)
def test_not_yaml(content: str, tmp_path: Path) -> None:
    refused(write(tmp_path, content), "not valid YAML")


def test_the_line_is_named(tmp_path: Path) -> None:
    refused(write(tmp_path, "name: x\nbase: [1\ntasks: 3\n"), "in line 3")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", "é".encode("latin-1"), bytes(range(256))])
def test_not_text(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    refused(tmp_path / "recipe.yaml", "not UTF-8 text")


def test_no_such_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.yaml", "cannot read the recipe (No such file")
    refused(tmp_path, "cannot read the recipe")


TOKENS = st.sampled_from(
    [
        "name",
        "base",
        "tasks",
        "path",
        "kind",
        "pairs",
        "sources",
        ": ",
        ":\n  ",
        "\n",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "&a ",
        "*a",
        "!!int ",
        "!!bool ",
        "!!float ",
        "!!set ",
        "!!timestamp ",
        "!!binary ",
        "'",
        '"',
        "|",
        "1",
        ".nan",
        "2001-01-01",
        "<<",
    ]
)


@given(text=st.text(alphabet=st.characters(codec="utf-8")) | st.lists(TOKENS, max_size=20).map("".join))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_any_text_loads_or_is_refused(text: str, tmp_path: Path) -> None:
    """Never another exception, whatever the file holds."""
    try:
        assert isinstance(load_recipe(write(tmp_path, text)), Recipe)
    except InputError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)


SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text("ab/{}", max_size=4)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)


@given(
    path=st.sampled_from(
        [
            "name",
            "seed",
            "data",
            "base",
            "base.path",
            "tasks",
            "tasks.a",
            "tasks.a.sources",
            "tasks.a.prompts",
            "tasks.a.loss",
            "tasks.a.sources.0.where",
            "tasks.a.training",
            "training",
            "joint",
            "joint.j",
            "probe",
            "positioning",
            "positioning.order",
            "positioning.start",
            "merges",
            "evaluation",
        ]
    ),
    value=VALUES,
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_any_value_anywhere_loads_or_is_refused(path: str, value: object, tmp_path: Path) -> None:
    try:
        recipe = load_recipe(write(tmp_path, changed(path, value)))
    except InputError as error:
        assert str(tmp_path) in str(error)
    else:
        assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_a_loss_keeps_its_parameters() -> None:
    assert Loss(name="infonce", parameters={"temperature": 0.1}).parameters == {"temperature": 0.1}
