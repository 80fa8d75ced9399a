"""docs/any-module.md takes anybody's module from a recording to a file, as it says."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "any-module.md"


def test_its_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 3
    names = {}
    for number, text in enumerate(blocks):
        exec(compile(text, f"{PAGE.name}:{number}", "exec"), names)
    report = names["report"]
    assert report.layers  # of quantize_linears, the last one so called
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["model.safetensors", "network.safetensors"]
    printed = capsys.readouterr().out
    assert "gptq-w4a8 on 32 calls, cut into 3 blocks" in printed
    assert float(re.search(r"in float stay .*\n(.*)", printed)[1]) == pytest.approx(0.1, abs=0.1)
