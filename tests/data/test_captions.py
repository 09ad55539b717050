import pytest

from mip.data.captions import compose, is_same, names


@pytest.mark.parametrize(
    ("caption", "label"),
    [
        ("a cat on a mat", "cat"),
        ("Two Cats.", "cat"),
        ("one cat", "cats"),
        ("three babies", "baby"),
        ("wolves and knives", "wolf"),
        ("wolves and knives", "knife"),
        ("many people", "person"),
        ("two boxes", "box"),
        ("a Robot  Toy here", "robot toy"),
        ("robot toys", "Robot toy"),
    ],
)
def test_a_label_is_found_as_a_whole_word_in_any_case_and_number(caption: str, label: str):
    assert names(caption, label)


@pytest.mark.parametrize(
    ("caption", "label"),
    [
        ("a catalog", "cat"),
        ("a cat-like toy", "cat"),
        ("xcat", "cat"),
        ("robot", "robot toy"),
        ("", "cat"),
        ("a", ""),
    ],
)
def test_a_label_inside_another_word_is_not_found(caption: str, label: str):
    assert not names(caption, label)


def test_names_differ_when_the_words_do():
    assert is_same("Cats", "cat")
    assert not is_same("cat", "dog")
    assert not is_same("toy cat", "cat")
    assert not is_same("", "")


@pytest.mark.parametrize(
    ("labels", "caption"),
    [
        (["cup"], "a cup"),
        (["cup", "star"], "a cup and a star"),
        (["apple", "cup", "unicorn"], "an apple, a cup and a unicorn"),
        (["hourglass", "onion"], "an hourglass and an onion"),
    ],
)
def test_captions_are_composed_of_labels(labels: list[str], caption: str):
    assert compose(labels) == caption
