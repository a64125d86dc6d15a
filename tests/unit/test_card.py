"""The model card: front matter that the hub can read, and nothing of this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from streammerge.storage.card import license_of, model_card

RECIPE = "base_model: org/llama\nmerge_method: ties\nadapters:\n  - {path: math, weight: 0.5}\n"


def card(**changes: Any) -> str:
    given: dict[str, Any] = {
        "base": "org/llama",
        "models": ["me/math", "code"],
        "method": "ties",
        "recipe_yaml": RECIPE,
        "library_version": "0.1.0",
        "changed": ["math: 224 of 224 tensors applied, mean relative change 0.8 %"],
        "license": "apache-2.0",
    }
    return model_card(**(given | changes))


def front_matter(text: str) -> dict[str, Any]:
    start, front, _ = text.split("---\n", 2)
    assert start == ""
    return dict(yaml.safe_load(front))


def test_front_matter() -> None:
    assert front_matter(card()) == {
        "license": "apache-2.0",
        "base_model": ["org/llama", "me/math", "code"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "streammerge"],
    }


def test_an_unknown_licence_is_not_made_up() -> None:
    assert "license" not in front_matter(card(license=None))


def test_a_model_that_is_named_twice_is_listed_once() -> None:
    bases = front_matter(card(models=["me/math", "org/llama", "me/math"]))["base_model"]
    assert bases == ["org/llama", "me/math"]


def test_what_cannot_be_a_hub_id_stands_in_the_text_alone() -> None:
    text = card(base="my llama", models=["a: [b", "x\ny"])
    assert "base_model" not in front_matter(text)
    assert "`my llama`, `a: [b`, `x y`" in text


def test_front_matter_stays_yaml_whatever_the_names() -> None:
    for name in ("no", "1.0", "null", "0x1"):
        assert front_matter(card(base=name, models=[]))["base_model"] == [name]


def test_the_text_says_what_how_and_how_to_load() -> None:
    text = card()
    assert f"```yaml\n{RECIPE}```\n" in text
    assert "streammerge 0.1.0" in text
    assert "method `ties`" in text
    assert "- math: 224 of 224 tensors applied" in text
    assert "from_pretrained(" in text
    assert "- " not in card(changed=[]).split("# Merge")[1].replace(RECIPE, "")


def test_backticks_break_out_of_no_fence() -> None:
    text = card(recipe_yaml="a: '```'\n# ````\n", models=["a`b"])
    assert "`````yaml\na: '```'\n# ````\n`````\n" in text
    assert "`` a`b ``" in text


def test_braces_in_what_is_handed_in_are_left_alone() -> None:
    assert "{title}" in card(recipe_yaml="{path: '{title}'}")


def test_the_same_call_gives_the_same_bytes_and_no_machine() -> None:
    text = card()
    assert text == card()
    words = [os.uname().nodename, os.getcwd(), "/home/", "/tmp"]
    assert not [word for word in words if word in text]


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("---\r\ntags:\r\n- a\r\nlicense: 'llama3.1' # see LICENSE\r\n---\r\n", "llama3.1"),
        ('\ufeff---\nlicense: "other"\nlicense_name: x\n---\n', "other"),
        ("---\nlicense_name: x\nnested:\n  license: mit\n---\n", None),
        ("---\nlicense:\n- mit\n---\n", None),
        ("---\nlicense: &a [*a, *a]\n---\n", None),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("# x\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: mit\nnever closed", None),
        ("", None),
    ],
)
def test_the_licence_of_the_donor(tmp_path: Path, readme: str, expected: str | None) -> None:
    (tmp_path / "README.md").write_bytes(readme.encode())
    assert license_of(tmp_path) == expected


def test_no_readme_no_licence(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").symlink_to("nowhere")
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").unlink()
    os.mkfifo(tmp_path / "README.md")
    assert license_of(tmp_path) is None


def test_a_readme_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nname: \xff\nlicense: mit\n---\n" + bytes(1 << 20))
    assert license_of(tmp_path) == "mit"
