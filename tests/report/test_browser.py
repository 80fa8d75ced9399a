"""The report page in a real browser: what it does, where the other tests read what it holds."""

import re

import pytest

from mlxquant.report.page import write_page

from support.chromium import opened
from support.sample_report import write_sample

pytestmark = pytest.mark.browser
USED = """<script>addEventListener("load", async () => {
  const part = (name) => document.querySelector(`[data-part="${name}"]`);
  document.querySelector('[data-by="1"]').click();
  part("model").value = "2";
  part("model").dispatchEvent(new Event("change"));
  document.querySelector('[data-mode="difference"]').click();
  await new Promise((done) => setTimeout(done, 500));
  const pixels = part("canvas").getContext("2d").getImageData(0, 0, part("canvas").width, part("canvas").height).data;
  document.body.dataset.pixels = pixels.filter((value, i) => i % 4 < 3 && value > 0).length;
});</script>"""
MEASURED = """<script>addEventListener("load", () => {
  document.body.dataset.wide = `${document.documentElement.scrollWidth} of ${innerWidth}`;
});</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_sample(folder)
    return write_page(folder)


def with_script(page, folder, script):
    """A copy of the page that does something by itself."""
    text = page.read_text("utf-8")
    assert text.count("</body>") == 1
    path = folder / "page.html"
    path.write_text(text.replace("</body>", f"{script}</body>"), "utf-8")
    return path


def test_it_opens_without_errors(page, tmp_path):
    document, console = opened(page, tmp_path)
    assert console == []
    assert 'class="js"' in document
    assert '<span data-part="place">1 of 3</span>' in document


def test_pictures_are_gone_through_and_subtracted(page, tmp_path):
    document, console = opened(with_script(page, tmp_path, USED), tmp_path / "profile", "--virtual-time-budget=10000")
    assert console == []
    assert '<span data-part="place">2 of 3</span>' in document
    assert re.search(r'<button[^>]*data-mode="difference"[^>]*aria-pressed="true"', document)
    assert re.search(r'class="cell chosen"[^>]*data-model="2"[^>]*data-prompt="1"', document)
    assert "times 8" in document
    assert int(re.search(r'data-pixels="(\d+)"', document)[1]) > 100


@pytest.mark.parametrize("width", [500, 1400])
def test_nothing_is_wider_than_the_window(page, tmp_path, width):
    size = f"--window-size={width},900"
    document, _ = opened(with_script(page, tmp_path, MEASURED), tmp_path / "profile", size)
    needed, there = map(int, re.search(r'data-wide="(\d+) of (\d+)"', document).groups())
    assert there == width
    assert needed <= there
