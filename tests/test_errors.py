"""The error that a user sees."""

import pytest

from vitrap.errors import UserError, unknown

MANY = [f"vit_{size}_patch{patch}_{side}" for size in "tsblhg" for patch in (8, 16, 32) for side in (224, 384, 448)]


def test_it_is_a_value_error_that_says_its_line() -> None:
    assert issubclass(UserError, ValueError)
    assert str(UserError("what, where, the remedy")) == "what, where, the remedy"


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("agbe", ["badnets", "ageb"], "unknown attack 'agbe'; did you mean 'ageb'? known: ageb, badnets"),
        ("xyz", ["badnets", "ageb"], "unknown attack 'xyz'; known: ageb, badnets"),
        ("", ["ageb"], "unknown attack ''; known: ageb"),
        (3, ["ageb"], "unknown attack 3; known: ageb"),
        ("x", [], "unknown attack 'x'; known: "),
        ("x", (n for n in ("b", "a")), "unknown attack 'x'; known: a, b"),
    ],
)
def test_an_unknown_name_is_told_with_what_is_known(name: object, known: list[str], message: str) -> None:
    found = unknown("attack", name, known)
    assert isinstance(found, UserError)
    assert str(found) == message


def test_of_many_names_only_the_close_ones_are_told() -> None:
    message = str(unknown("model", "vit_t_patch16_24", MANY))
    assert message.startswith(
        "unknown model 'vit_t_patch16_24'; did you mean 'vit_t_patch16_224'? close: vit_t_patch16_22"
    )
    assert message.count(",") == 7


@pytest.mark.parametrize(("n", "word"), [(40, "known"), (41, "close")])
def test_forty_names_are_told_in_full(n: int, word: str) -> None:
    message = str(unknown("model", MANY[0] + "x", MANY[:n]))
    assert f"? {word}: " in message
    assert all(name in message for name in MANY[:n]) == (word == "known")
