"""What a schema lets through, what it says about the rest, and that JSON means what the standard says."""

import pytest

from mlxquant.errors import ArtifactError
from mlxquant.files import schema
from mlxquant.files.checked import read_json, read_tensors, write_json, write_tensors

LAYER = schema.entries({"shape": schema.shape, "rank": schema.whole()}, {"rotation": schema.whole(1)})
MODEL = schema.entries({"layers": schema.table_of(LAYER)})


def message(check, value, where="x"):
    with pytest.raises(schema.MismatchError) as caught:
        check(value, where)
    return str(caught.value)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (schema.whole(1, 8), [1, 8], [0, 9, True, 1.0, "1", None, 10**30, float("nan")]),
        (schema.whole(), [0, 2**31 - 1], [-1, 2**31, 2**63]),
        (schema.number(), [0, -1.5, 3.3e38], [float("nan"), float("inf"), -float("inf"), 1e39, 10**400, True, "1"]),
        (schema.number(0, 1), [0, 0.5, 1], [-1e-9, 1.1]),
        (schema.flag, [True, False], [0, 1, None, "true"]),
        (schema.text, ["", "a"], [None, 1, ["a"]]),
        (schema.one_of(4, "channel"), [4, "channel"], [4.0, True, "4", None, [4]]),
        (schema.maybe(schema.flag), [None, True], [0]),
        (schema.either(schema.flag, schema.text), [True, "a"], [1, None]),
        (schema.every(schema.whole(), schema.whole(2, 9)), [2, 9], [1, 10, "2"]),
        (schema.array_of(schema.whole(), 1, 2), [[1], [1, 2]], [[], [1, 2, 3], [-1], {"0": 1}, "12", None]),
        (schema.table_of(schema.whole(), 1), [{"a": 1}], [{}, {"a": -1}, [1], None]),
        (schema.entries({"a": schema.flag}, {"b": schema.flag}), [{"a": True}, {"a": True, "b": True, "c": 0}],
         [{}, {"a": 1}, {"a": True, "b": 1}, [], None]),
        (schema.inside, ["a", "a/b.npz", "a..b", ".hidden"],
         ["", " ", "..", "../a", "a/../../b", "/a", "C:\\a", "C:a", "\\\\host\\a", "a\\..\\..\\b", "a\0b", None, 1]),
        (schema.floating, ["float32", "bfloat16"], ["float64", "int8", "array", "__class__"]),
    ],
)  # fmt: skip
def test_what_fits(check, right, wrong):
    for value in right:
        check(value, "x")
    for value in wrong:
        assert message(check, value).startswith("x")


def test_a_mismatch_says_where_what_and_what_was_expected():
    found = message(MODEL, {"layers": {"blocks.0.fc1": {"shape": [4, 2**31], "rank": 0}}}, "")
    assert found == "layers.blocks.0.fc1.shape[1] is 2147483648, expected a whole number from 0 to 2147483647"
    assert message(MODEL, {"layers": {"a": {"shape": [4]}}}, "") == "layers.a has no 'rank'"
    assert message(MODEL, [], "") == "it is an array of 0, expected an object"
    assert (
        message(schema.whole(0, 9), 10**5000)
        == "x is a whole number of 16610 bits, expected a whole number from 0 to 9"
    )
    assert message(schema.shape, [1] * 9) == "x has 9 entries, expected 0 to 8"
    assert len(message(schema.whole(), "y" * 10**6)) < 200
    assert len(message(schema.table_of(schema.flag), {"y" * 10**6: 1}, "")) < 200


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", '{"a": [-Infinity]}', "[" * 10**5, "", "{", "1" * 5000, r'["\uD83D"]']
)
def test_json_is_that_of_the_standard(text):
    for data in (text, text.encode()):
        with pytest.raises(ValueError, match=r"\w"):
            schema.json_value(data)
    assert schema.json_value(r'["\uD83D\uDE00"]') == ["😀"]


def test_readers_hold_facts_against_a_schema_though_the_checksum_is_right(tmp_path):
    facts = {"layers": {"a": {"shape": [1], "rank": 2**31}}}
    write_json(tmp_path / "a.json", "model", facts)
    write_tensors(tmp_path / "a.safetensors", "model", {}, facts)
    expected = (
        r"a\.\w+: incomplete or foreign, layers\.a\.rank is 2147483648, expected a whole number .*; write it anew$"
    )
    with pytest.raises(ArtifactError, match=expected):
        read_json(tmp_path / "a.json", "model", MODEL)
    with pytest.raises(ArtifactError, match=expected):
        read_tensors(tmp_path / "a.safetensors", "model", schema=MODEL)
    assert read_json(tmp_path / "a.json", "model")["layers"] == facts["layers"]
