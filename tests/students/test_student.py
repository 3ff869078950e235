"""Students of every family: cut, saved, loaded by transformers alone, and refused where they cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.errors import DamageError, ModelError, RecipeError
from kdcache.recipe import StudentSection
from kdcache.students.build import build_student
from kdcache.students.model import Student
from kdcache.students.save import load_student, read_record, save_student, student_record
from kdcache.teachers.bundle import load_teacher
from kdcache.testing.teachers import make_teachers
from kdcache.testing.tiny import Family, make_model

LABELS = ("negative", "positive")
TINY: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 80,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    families: tuple[Family, ...] = ("bert", "roberta", "distilbert", "xlm-roberta")
    return {family: make_model(root / family, family) for family in families}


def build(section: StudentSection, **options: Any) -> Student:
    return build_student(section, LABELS, **({"max_length": 32, "seed": 0} | options))


def run(student: Student) -> Any:
    inputs = {
        "input_ids": torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    with torch.no_grad():
        return student.model.eval()(inputs, hidden_states=True)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "xlm-roberta"])
def test_first_layers_of_every_family(models: dict[str, Path], family: str) -> None:
    from transformers import AutoModel

    student = build(StudentSection(init_from=str(models[family]), layers=2))
    assert student.model.depth == 2
    output = run(student)
    assert len(output.hidden_states) == 3
    assert output.logits.shape == (2, 2)
    source = AutoModel.from_pretrained(models[family], dtype=torch.float32).eval()
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        ours = student.model(inputs, hidden_states=True).hidden_states
        theirs = source(**inputs, output_hidden_states=True).hidden_states
    for layer in range(3):
        assert torch.allclose(ours[layer], theirs[layer], atol=1e-6)


@pytest.mark.parametrize("model_type", ["mpnet", "electra", "deberta", "deberta-v2", "camembert"])
def test_families_cut_from_config_checkpoints(tmp_path: Path, models: dict[str, Path], model_type: str) -> None:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.for_model(model_type, **TINY, vocab_size=400, pad_token_id=0, embedding_size=16)
    AutoModel.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(models["bert"]).save_pretrained(tmp_path)
    student = build(StudentSection(init_from=str(tmp_path), layers=[1, 3]))
    assert (student.model.depth, len(run(student).hidden_states)) == (2, 3)
    save_student(tmp_path / "student", student, record_of(student), "card")
    assert torch.equal(run(load_student(tmp_path / "student")).logits, run(student).logits)


def record_of(student: Student) -> Any:
    return student_record(student, name="tiny", method="kd", text_columns=("sentence",), label_column="label")


def test_chosen_layers_are_those(models: dict[str, Path]) -> None:
    whole = build(StudentSection(init_from=str(models["bert"])))
    student = build(StudentSection(init_from=str(models["bert"]), layers=[2, 4]))
    kept, blocks = student.model.network.base_model.encoder.layer, whole.model.network.base_model.encoder.layer
    for mine, theirs in zip(kept, (blocks[1], blocks[3]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (5, "asks for 5 layers, but .* has 4"),
        ([1, 7], "names layer 7, but .* layers 1 to 4"),
        ([3, 1], "rising order"),
    ],
)
def test_layers_that_are_not_there(models: dict[str, Path], layers: Any, message: str) -> None:
    section = StudentSection(init_from=str(models["bert"]), layers=layers)
    with pytest.raises(ModelError, match=message) as caught:
        build(section)
    assert caught.value.exit_code == 1


def test_albert_cannot_be_cut(tmp_path: Path, models: dict[str, Path]) -> None:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    AutoModel.from_config(AutoConfig.for_model("albert", **TINY, vocab_size=400, embedding_size=16)).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(models["bert"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="albert"):
        build(StudentSection(init_from=str(tmp_path), layers=2))
    assert build(StudentSection(init_from=str(tmp_path))).model.depth == 4


def test_new_weights_are_seeded_and_the_global_generator_untouched(models: dict[str, Path]) -> None:
    section = StudentSection(init_from=str(models["bert"]), layers=2)
    before = torch.get_rng_state()
    first, again, other = build(section), build(section), build(section, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    classifiers = [student.model.network.classifier.weight for student in (first, again, other)]
    assert torch.equal(classifiers[0], classifiers[1])
    assert not torch.equal(classifiers[0], classifiers[2])


def test_from_config(models: dict[str, Path]) -> None:
    section = StudentSection(
        config={"model_type": "bert", **TINY, "num_hidden_layers": 2}, tokenizer=str(models["bert"])
    )
    student = build(section)
    assert (student.model.depth, student.model.width) == (2, 16)
    assert student.model.config.vocab_size == len(student.tokenizer)


@pytest.mark.parametrize("config", [{"model_type": "no-such-thing"}, {"hidden_size": 16}])
def test_bad_config(models: dict[str, Path], config: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"student\.config"):
        build(StudentSection(config=config, tokenizer=str(models["bert"])))


def test_dropout_override(models: dict[str, Path]) -> None:
    for family in ("bert", "distilbert"):
        student = build(StudentSection(init_from=str(models[family])), dropout=0.0)
        assert all(module.p == 0.0 for module in student.model.modules() if isinstance(module, torch.nn.Dropout))
    student = build(StudentSection(init_from=str(models["bert"])))
    assert any(module.p == 0.1 for module in student.model.modules() if isinstance(module, torch.nn.Dropout))


def test_max_length_beyond_the_positions(models: dict[str, Path]) -> None:
    build(StudentSection(init_from=str(models["bert"]), max_length=80))
    build(StudentSection(init_from=str(models["roberta"]), max_length=78))
    with pytest.raises(ModelError, match=r"max_length is 79, but .* positions for 78"):
        build(StudentSection(init_from=str(models["roberta"]), max_length=79))


def test_tokenizer_with_more_tokens_than_embeddings(models: dict[str, Path]) -> None:
    section = StudentSection(init_from=str(models["distilbert"]), tokenizer=str(models["roberta"]))
    with pytest.raises(ModelError, match="has embeddings for"):
        build(section)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        build(StudentSection(init_from=str(tmp_path / "nowhere"), tokenizer=None))


def test_teacher_weights_without_teachers(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="teacher:bert") as caught:
        build(StudentSection(init_from="teacher:bert"), teachers_dir=tmp_path / "teachers")
    assert "cofinetune" in caught.value.hint


def test_loads_without_kdcache_in_a_fresh_process(tmp_path: Path, models: dict[str, Path]) -> None:
    student = build(StudentSection(init_from=str(models["roberta"]), layers=2))
    save_student(tmp_path / "student", student, record_of(student), "card")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T\n"
        "m, t = M.from_pretrained(sys.argv[1]), T.from_pretrained(sys.argv[1])\n"
        "assert m.config.id2label == {0: 'negative', 1: 'positive'}, m.config.id2label\n"
        "assert not any(name.split('.')[0] == 'kdcache' for name in sys.modules)\n"
        "print(m.eval()(**t('the film is good', return_tensors='pt')).logits.tolist()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "student")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    inputs = student.tokenizer("the film is good", return_tensors="pt")
    with torch.no_grad():
        ours = student.model.eval()(dict(inputs)).logits[0].tolist()
    assert eval(done.stdout) == pytest.approx(ours, abs=1e-6)


def test_record_says_how_to_feed_the_student(tmp_path: Path, models: dict[str, Path]) -> None:
    student = build(StudentSection(init_from=str(models["bert"]), layers=1))
    save_student(tmp_path / "student", student, record_of(student), "the card")
    record = read_record(tmp_path / "student")
    assert record == record_of(student)
    assert (tmp_path / "student" / "README.md").read_text() == "the card"
    (tmp_path / "student" / "kdcache.json").write_text("{}")
    with pytest.raises(DamageError, match=r"kdcache\.json"):
        read_record(tmp_path / "student")
    with pytest.raises(RecipeError, match="no model directory"):
        read_record(tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "teachers"
    return make_teachers(directory, {"bert": "bert", "own": "roberta"}, label_names=LABELS, own_heads=["own"])


def test_starts_from_a_teacher(teachers: Path) -> None:
    student = build(StudentSection(init_from="teacher:bert", layers=2), teachers_dir=teachers)
    teacher = load_teacher(teachers, "bert")
    kept = student.model.network.base_model.encoder.layer[1].parameters()
    for mine, theirs in zip(kept, teacher.model.encoder.encoder.layer[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert build(StudentSection(init_from="teacher:own", layers=1), teachers_dir=teachers).model.depth == 1
    with pytest.raises(ModelError, match="no teacher 'gpt'; it holds: bert, own"):
        build(StudentSection(init_from="teacher:gpt"), teachers_dir=teachers)


def test_shared_head_is_the_teachers(teachers: Path) -> None:
    student = build(StudentSection(init_from="teacher:bert", head="shared"), teachers_dir=teachers)
    assert student.model.adapter is None
    assert all(parameter.requires_grad for parameter in student.model.parameters())
    teacher = load_teacher(teachers, "bert")
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        assert torch.allclose(student.model.eval()(inputs).logits, teacher.model(inputs).logits, atol=1e-6)


def test_shared_head_needs_one(tmp_path: Path, models: dict[str, Path]) -> None:
    section = StudentSection(init_from=str(models["bert"]), head="shared")
    with pytest.raises(ModelError, match="shared head"):
        build(section)
    only_own = make_teachers(tmp_path / "teachers", {"own": "bert"}, label_names=LABELS, own_heads=["own"])
    (only_own / "shared_head.safetensors").unlink()
    with pytest.raises((ModelError, DamageError)):
        build(section, teachers_dir=only_own)


def test_shared_head_with_adapter_loads_with_kdcache_and_runs_as_onnx(tmp_path: Path, teachers: Path) -> None:
    import onnxruntime

    source = make_model(tmp_path / "wide", "distilbert", width=24, depth=2)
    student = build(StudentSection(init_from=str(source), head="shared", layers=1), teachers_dir=teachers, dropout=0.0)
    assert student.model.adapter is not None
    save_student(tmp_path / "student", student, record_of(student), "card")
    loaded = load_student(tmp_path / "student")
    encoded = student.tokenizer(
        ["the film is good", "a very long and rather tired story of it"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = student.model(dict(encoded)).logits
        assert torch.equal(loaded.model(dict(encoded)).logits, expected)
    session = onnxruntime.InferenceSession(tmp_path / "student" / "model.onnx", providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    (found,) = session.run(["logits"], {name: encoded[name].numpy() for name in names})
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)
    (tmp_path / "student" / "shared_head.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(DamageError, match="shared_head"):
        load_student(tmp_path / "student")
