"""Recipes: defaults, overrides, paths, the round trip through TOML, and what the user is told about mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import RecipeError
from kdcache.recipe import Recipe, dump_toml, load_recipe

SMALL = """
name = "small"
[data]
train = "train.tsv"
validation = "dev.tsv"
text = ["sentence"]
label = "label"
[[teachers]]
name = "bert"
model = "google-bert/bert-base-uncased"
[[teachers]]
name = "roberta-v1.5"
model = "FacebookAI/roberta-base"
[student]
init_from = "teacher:bert"
layers = 2
"""

DESIGN = """
name = "sst2"
[data]
train = "data/train.tsv"
validation = "data/dev.tsv"
test = "data/test.tsv"
transfer = ["data/more.tsv"]
text = ["sentence"]
label = "label"
max_length = 128
[[teachers]]
name = "bert"
model = "google-bert/bert-base-uncased"
[[teachers]]
name = "roberta"
model = "FacebookAI/roberta-base"
head = "own"
[cofinetune]
pooling = "attention"
epochs = 3
batch_size = 32
learning_rate = 2e-5
seed = 0
[dump]
backend = "torch"
layers = [4, 8, 12]
projection = "pca"
dim = 128
dtype = "int8"
[student]
init_from = "google-bert/bert-base-uncased"
layers = 4
head = "standard"
[distill]
method = "mt-bert"
temperature = 1.0
hidden_direction = "student-to-teacher"
paper = true
epochs = 3
batch_size = 32
learning_rate = 5e-5
seed = 0
[distill.weights]
task = 1.0
soft = 1.0
hidden = 0.1
"""


def write(directory: Path, text: str = SMALL) -> Path:
    path = directory / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def load(directory: Path, *overrides: str, text: str = SMALL) -> Recipe:
    return load_recipe(write(directory, text), list(overrides))


def refusal(directory: Path, *overrides: str, text: str = SMALL) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load(directory, *overrides, text=text)
    assert caught.value.exit_code == 2
    return caught.value


def test_defaults_are_those_of_the_documentation(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert (recipe.dump.projection, recipe.dump.dim, recipe.dump.dtype, recipe.dump.part_size) == (
        "pca",
        128,
        "int8",
        None,
    )
    assert (recipe.distill.method, recipe.distill.paper, recipe.distill.weights.hidden) == ("mt-bert", False, 0.1)
    assert (recipe.cofinetune.learning_rate, recipe.distill.learning_rate) == (2e-5, 5e-5)
    assert recipe.data.labels is None
    assert recipe.teacher("bert").head == "shared"
    assert recipe.require_student().layers == 2


def test_the_full_recipe_of_the_documentation_is_read(tmp_path: Path) -> None:
    recipe = load(tmp_path, text=DESIGN)
    assert recipe.dump.layers == [4, 8, 12]
    assert recipe.teacher("roberta").head == "own"
    assert recipe.distill.paper is True


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "pipelines").glob("*.toml")), ids=lambda path: path.name
)
def test_the_recipes_that_come_with_kdcache_are_read(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.teachers
    assert recipe.student


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("distill.seed=1", "distill.seed", 1),
        (" distill.seed = 1 ", "distill.seed", 1),
        ("distill.learning_rate=3e-4", "distill.learning_rate", 3e-4),
        ("distill.learning_rate=1", "distill.learning_rate", 1.0),
        ("distill.paper=true", "distill.paper", True),
        ("distill.method=kd", "distill.method", "kd"),
        ('distill.method="kd"', "distill.method", "kd"),
        ("distill.teachers=bert", "distill.teachers", ["bert"]),
        ("distill.teacher_layers={bert=[2, 4]}", "distill.teacher_layers", {"bert": [2, 4]}),
        ("distill.teacher_layers.bert=[2, 4]", "distill.teacher_layers", {"bert": [2, 4]}),
        ("distill.weights.hidden=0", "distill.weights.hidden", 0.0),
        ("dump.layers=[0, 3]", "dump.layers", [0, 3]),
        ("dump.layers=all", "dump.layers", "all"),
        ("student.layers=[1, 3]", "student.layers", [1, 3]),
        ("name=other", "name", "other"),
        ("data.label=a = b", "data.label", "a = b"),
        ("data.labels=['neg', 'pos']", "data.labels", ["neg", "pos"]),
        ("data.transfer=acme/texts:small/train", "data.transfer", ["acme/texts:small/train"]),
    ],
)
def test_overrides_have_the_type_of_their_key(tmp_path: Path, override: str, place: str, value: Any) -> None:
    found: Any = load(tmp_path, override)
    for step in place.split("."):
        found = getattr(found, step)
    assert found == value
    assert type(found) is type(value)


def test_overrides_find_teachers_by_name_dots_included(tmp_path: Path) -> None:
    recipe = load(tmp_path, "teachers.bert.head=own", "teachers.roberta-v1.5.max_length=64")
    assert [(teacher.head, teacher.max_length) for teacher in recipe.teachers] == [("own", None), ("shared", 64)]


def test_later_overrides_win(tmp_path: Path) -> None:
    assert load(tmp_path, "distill.seed=1", "distill.seed=2").distill.seed == 2


def test_paths_are_relative_to_the_recipe_and_hub_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    for directory in (recipes / "models" / "bert", elsewhere / "typed"):
        directory.mkdir(parents=True)
    (recipes / "train.tsv").touch()
    monkeypatch.chdir(elsewhere)
    recipe = load(
        recipes,
        "teachers.bert.model=models/bert",
        "student.init_from=typed",
        "data.transfer=['more.csv', 'acme/texts']",
    )
    assert recipe.data.train == str(recipes / "train.tsv")
    assert recipe.data.validation == str(recipes / "dev.tsv")  # not there: the error will name the path that was meant
    assert recipe.data.transfer == [str(recipes / "more.csv"), "acme/texts"]
    assert recipe.teacher("bert").model == str(recipes / "models" / "bert")
    assert recipe.teacher("roberta-v1.5").model == "FacebookAI/roberta-base"
    assert recipe.require_student().init_from == str(elsewhere / "typed")  # as typed on the command line


def test_a_linked_file_keeps_its_name_and_a_linked_directory_is_followed(tmp_path: Path) -> None:
    """Version control of data links train.tsv to a file that is named by its digest, without an ending."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "3fa9c1").touch()
    (tmp_path / "train.tsv").symlink_to("blobs/3fa9c1")
    (tmp_path / "bert").symlink_to("blobs")
    recipe = load(tmp_path, "teachers.bert.model=./bert")
    assert recipe.data.train == str(tmp_path / "train.tsv")
    assert recipe.teacher("bert").model == str(tmp_path / "blobs")


def test_paths_that_look_like_paths_become_absolute_even_where_nothing_is_there(tmp_path: Path) -> None:
    recipe = load(tmp_path, "teachers.bert.model=./none", "student.init_from=~/none")
    assert Path(recipe.teacher("bert").model) == tmp_path / "none"
    assert recipe.require_student().init_from == str(Path.home() / "none")


def test_a_recipe_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert load(tmp_path, text="\ufeff" + SMALL).name == "small"


words = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=20)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
rates = st.floats(1e-9, 10, allow_nan=False)
documents = st.fixed_dictionaries(
    {
        "name": names,
        "data": st.fixed_dictionaries(
            {
                "train": st.just("acme/train"),
                "text": st.just(["one", "two"]),
                "label": words.filter(lambda word: word not in ("one", "two")),
            },
            optional={
                "labels": st.lists(words, min_size=2, max_size=4, unique=True),
                "licence": words,
                "seed": st.integers(0, 2**32 - 1),
            },
        ),
    },
    optional={
        "teachers": st.lists(names, max_size=3, unique_by=str.lower).map(
            lambda found: [{"name": name, "model": "m"} for name in found]
        ),
        "dump": st.fixed_dictionaries(
            {}, optional={"layers": st.lists(st.integers(0, 40), min_size=1, unique=True) | st.just("last")}
        ),
        "student": st.fixed_dictionaries(
            {
                "tokenizer": st.just("t"),
                "config": st.dictionaries(words, st.integers(-9, 9) | words | st.booleans() | rates, max_size=4),
            }
        ),
        "distill": st.fixed_dictionaries(
            {},
            optional={
                "learning_rate": rates,
                "teacher_layers": st.dictionaries(names, st.lists(st.integers(0, 9)), max_size=2),
            },
        ),
    },
)


@given(documents)
def test_a_recipe_survives_the_round_trip_through_toml(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]
) -> None:
    recipe = Recipe.model_validate(document)
    path = tmp_path_factory.mktemp("round") / "recipe.toml"
    path.write_text(dump_toml(recipe), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert dump_toml(again) == dump_toml(recipe)


WRONG: list[tuple[str, str, str]] = [
    ("distil.seed=1", "has an unknown key 'distil'", "Did you mean 'distill'?"),
    ("distill.sede=1", "has an unknown key 'distill.sede'", "Did you mean 'seed'?"),
    ("distill.wieghts={task=1}", "has an unknown key 'distill.wieghts'", "Did you mean 'weights'?"),
    ("distill.weights.tsak=1", "has an unknown key 'distill.weights.tsak'", "Did you mean 'task'?"),
    ("distill.pooling=cls", "has an unknown key 'distill.pooling'", "'pooling' is a key of [cofinetune]."),
    ("data.zzz=1", "has an unknown key 'data.zzz'", "Known keys there: group, label, labels, licence, max_length,"),
    ("teachers.bert.modle=x", "has an unknown key 'teachers.bert.modle'", "Did you mean 'model'?"),
    ("distill.seed=x", 'distill.seed is "x"; a whole number was expected', ""),
    ("distill.seed=-1", "distill.seed is -1; 0 or more was expected", ""),
    ("distill.epochs=true", "distill.epochs is true; a whole number was expected", ""),
    ("distill.epochs=2.0", "distill.epochs is 2.0; a whole number was expected", ""),
    ("distill.epochs='2'", 'distill.epochs is "2"; a whole number was expected', ""),
    ("distill.learning_rate=0", "distill.learning_rate is 0; more than 0 was expected", ""),
    ("distill.learning_rate=inf", "distill.learning_rate is Infinity; a finite number was expected", ""),
    ("distill.temperature=nan", "distill.temperature is NaN; a finite number was expected", ""),
    ("distill.warmup=1", "distill.warmup is 1; less than 1 was expected", ""),
    ("distill.paper=1", "distill.paper is 1; true or false was expected", ""),
    ("distill.accumulation=64", "distill: accumulation 64 cuts a batch of 32 into more pieces than it has rows", ""),
    ("dump.dtype=int4", 'dump.dtype is "int4"; \'', "Did you mean 'int8'?"),
    (
        "dump.dtype=coded",
        'dump: dtype = "trellis" needs bytes: how many a token takes in a layer, for example bytes = 96',
        "",
    ),
    ("dump.bytes=96", 'dump: bytes = 96 goes with dtype = "trellis"; with "int8" set dim', ""),
    ('dump.per_layer={4={dtype="coded"}}', 'dump: per_layer.4: dtype = "trellis" needs bytes', ""),
    ("dump.per_layer={4={byte=3}}", "unknown key 'dump.per_layer.4.byte'", "Did you mean 'bytes'?"),
    (
        "dump.per_layer={four={dim=3}}",
        'dump.per_layer.four: \'four\' is no layer: give its number, "last" or "all"',
        "",
    ),
    ("dump.per_layer={last={dim=0}}", "dump.per_layer.last.dim is 0; 1 or more was expected", ""),
    (
        "dump.layers=evn",
        "dump.layers is \"evn\"; 'even', 'all', 'last' or 'none', or a list, in brackets, was expected",
        "Did you mean 'even'?",
    ),
    ("dump.layers=[1, -2]", "dump.layers is [1, -2]; 0 or more was expected", ""),
    ("dump.layers=[]", "dump.layers is []; a list of at least 1 was expected", ""),
    ("dump.layers=[2, 2]", "dump.layers: each may be named once, but these are named more often: [2, 2]", ""),
    ("student.layers=0", "student.layers is 0; 1 or more was expected", ""),
    ("student.config={a = 1}", "student: give either init_from or config", ""),
    (
        "student.init_from=teacher:rob",
        "student.init_from is 'teacher:rob', but the teachers are: bert, roberta-v1.5",
        "",
    ),
    ("student.init_from=", 'student.init_from is ""; a string that is not empty was expected', ""),
    ("data=3", "data is 3; a section was expected", ""),
    ("data.label=1", "data.label is 1; a string, in quotation marks, was expected", 'Write "1"'),
    ("data.label=sentence", "data: the column 'sentence' is both text and label", ""),
    ("data.text=['a', 'b', 'c']", 'data.text is ["a", "b", "c"]; a list of at most 2 was expected', ""),
    ("data.text=[]", "data.text is []; a list of at least 1 was expected", ""),
    ("data.text=['a', 'a']", "data.text: each may be named once", ""),
    ("data.labels=['a']", 'data.labels is ["a"]; a list of at least 2 was expected', ""),
    ("data.validation_fraction=0.1", "data: give validation or validation_fraction, not both", ""),
    (
        "name=a/b",
        "name is \"a/b\"; up to 64 letters, digits, '.', '_' and '-', the first a letter or digit, was expected",
        "",
    ),
    ("name=../x", 'name is "../x"', ""),
    ('name="a\\n"', "name is", ""),
    ("teachers=x", 'teachers is "x"; a list, in brackets, was expected', ""),
    ("teachers={name = 'x'}", "teachers is", "Write [[teachers]], in double brackets"),
    (
        "teachers.bert.name=Roberta-V1.5",
        "two teachers are called 'roberta-v1.5'; names must differ, and not by case alone",
        "",
    ),
    (
        "teachers.gpt.model=x",
        "there is no teacher 'gpt'; there are: bert, roberta-v1.5",
        "Teachers are added in the recipe.",
    ),
    ("teachers.model=x", "does not say which teacher; there are: bert, roberta-v1.5", "--set teachers.NAME.model=DIR"),
    ("name.x=3", "'name' is a value, not a section", "Set the value itself."),
    ("seed", "override 'seed' is not of the form section.key=value", "Example: --set distill.seed=1"),
    ("=1", "is not of the form section.key=value", "Example"),
    ("a..b=1", "is not of the form section.key=value", "Example"),
]


@pytest.mark.parametrize(("override", "message", "hint"), WRONG, ids=[override for override, _, _ in WRONG])
def test_what_is_wrong_is_told_with_key_value_and_expectation(
    tmp_path: Path, override: str, message: str, hint: str
) -> None:
    error = refusal(tmp_path, override)
    assert message in error.message
    assert hint in error.hint
    assert "\n" not in error.message + error.hint


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("[data]", "[data", "is not TOML: Expected ']'", "Strings need quotation marks"),
        ('label = "label"\n', "", "lacks the key 'data.label'", "kdcache pipelines cp quickstart"),
        ('name = "bert"\n', "", "lacks the key 'teachers.1.name'", "Add it"),
        ('name = "bert"', 'name = "b b"', 'teachers.b b.name is "b b"', ""),
        (
            "layers = 2",
            "layers = 2\nlayer = 3\nheads = 1",
            "has an unknown key 'student.layer' (and 1 more)",
            "Did you mean 'layers'?",
        ),
    ],
)
def test_what_is_wrong_in_the_file_is_told(tmp_path: Path, old: str, new: str, message: str, hint: str) -> None:
    error = refusal(tmp_path, text=SMALL.replace(old, new))
    assert message in error.message
    assert str(tmp_path / "recipe.toml") in error.message
    assert hint in error.hint


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe") as caught:
        load_recipe(tmp_path / "none.toml")
    assert "kdcache pipelines ls" in caught.value.hint
    with pytest.raises(RecipeError, match="is a directory; a recipe file was expected"):
        load_recipe(tmp_path)
    (tmp_path / "bad.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(RecipeError, match="is not UTF-8: invalid start byte at byte 8"):
        load_recipe(tmp_path / "bad.toml")
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "bad.toml" / "below")


def test_missing_parts_are_named_when_they_are_asked_for(tmp_path: Path) -> None:
    recipe = load(tmp_path, text=SMALL.partition("[[teachers]]")[0])
    with pytest.raises(RecipeError, match="recipe 'small' has no teacher 'bert'; it has: none"):
        recipe.teacher("bert")
    with pytest.raises(RecipeError, match=r"recipe 'small' has no \[student\] section"):
        recipe.require_student()


def test_recipes_are_read_without_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, kdcache.recipe, kdcache.progress, kdcache.data.task; "
        "print(sorted({'torch', 'transformers', 'pyarrow', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
