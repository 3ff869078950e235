import pytest

from kdcache.dump.layers import resolve_layers
from kdcache.errors import ModelError, RecipeError
from kdcache.methods.parts.layer_map import even_layers


def test_the_paper_s_layer_map() -> None:
    assert even_layers(12, 4) == (3, 6, 9, 12)
    assert even_layers(12, 6) == (2, 4, 6, 8, 10, 12)
    assert even_layers(6, 4) == (2, 3, 4, 6)
    assert even_layers(4, 4) == (1, 2, 3, 4)


@pytest.mark.parametrize("depth", range(1, 25))
@pytest.mark.parametrize("student_layers", [1, 2, 3, 5, 12])
def test_the_last_layers_meet_and_the_map_never_falls(depth: int, student_layers: int) -> None:
    layers = even_layers(depth, student_layers)
    assert len(layers) == student_layers
    assert layers[-1] == depth
    assert list(layers) == sorted(layers)


def test_settings() -> None:
    assert resolve_layers("even", 12, 3, "bert") == (4, 8, 12)
    assert resolve_layers("even", 2, 4, "bert") == (
        0,
        1,
        2,
    )  # two student layers share a teacher layer; it is stored once
    assert resolve_layers("all", 3, None, "bert") == (1, 2, 3)
    assert resolve_layers("last", 3, None, "bert") == (3,)
    assert resolve_layers([3, 0, 3], 3, None, "bert") == (0, 3)
    assert resolve_layers("none", 3, None, "bert") == ()  # soft labels only


def test_a_layer_that_does_not_exist_is_named_with_the_depth() -> None:
    with pytest.raises(ModelError, match=r"'bert' has no layer 13: its layers are 0 \(embeddings\) to 12"):
        resolve_layers([1, 13], 12, None, "bert")
    with pytest.raises(ModelError, match="no layer -1"):
        resolve_layers([-1], 12, None, "bert")


def test_even_needs_a_student() -> None:
    with pytest.raises(RecipeError, match="no student"):
        resolve_layers("even", 12, None, "bert")
