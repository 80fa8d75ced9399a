"""The report page: one file with everything in it, every number as the report has it, every text escaped."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mlxquant.errors import ArtifactError
from mlxquant.files.checked import read_json, write_json
from mlxquant.report import page_pictures, page_plots
from mlxquant.report.page import write_page
from mlxquant.report.page_layers import kind
from mlxquant.report.page_tables import plain

from support.sample_report import write_sample

SECTIONS = ("summary", "size", "pictures", "trajectory", "layers", "decisions", "methods", "details")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    facts = write_sample(folder)
    return folder, facts, write_page(folder).read_text("utf-8")


class Elements(HTMLParser):
    """Every tag with its attributes, and the text of each section's cells."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_nothing_is_loaded_from_anywhere(sample):
    _, _, html = sample
    elements = Elements(html)
    assert not [
        tag
        for tag, attrs in elements.tags
        if tag in ("iframe", "object", "embed", "base") or (tag == "script" and "src" in attrs)
    ]
    places = [
        attrs[name]
        for _, attrs in elements.tags
        for name in ("src", "href", "xlink:href", "srcset", "data")
        if attrs.get(name)
    ]
    assert len(places) > 20
    assert all(place.startswith(("data:", "#")) for place in places)
    assert all(place.startswith("#") for place in re.findall(r"url\(\s*['\"]?([^'\")]+)", html))
    assert "@import" not in html
    policy = next(
        attrs["content"] for tag, attrs in elements.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")


def test_every_section_is_there_and_ids_are_distinct(sample):
    _, _, html = sample
    ids = [attrs["id"] for _, attrs in Elements(html).tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert [name for name in ids if name in SECTIONS] == list(SECTIONS)
    wanted = set(re.findall(r"(?:href=\"|url\()#([\w-]+)", html))
    assert wanted <= set(ids)
    for name in SECTIONS:
        assert len(re.sub(r"<[^>]*>", "", html.split(f'id="{name}"')[1].split("</section>")[0]).strip()) > 20


def test_sampler_steps_are_whole_numbers(sample):
    drawn = sample[2].split('id="trajectory"')[1].split("</svg>")[0]
    ticks = re.findall(r"<text[^>]*>([\d.]+)</text>", drawn.split("matplotlib.axis_2")[0])
    assert ticks == ["1", "2", "3", "4"]


def test_a_stages_remarks_say_what_was_tried_on_it(sample):
    """As ``sweep`` records it, stages that were kept as they are included."""
    _, facts, html = sample
    part = html.split('id="decisions"')[1].split("</section>")[0]
    remarks = (
        "4.00 times less error than the next; 6.2% of the codes flipped; 20 steps; ptq4dit failed: a &lt;stage&gt;"
        " overflows; rotation tried on 1 input, not kept; smoothquant on 2 inputs; tcaq helps no input"
    )
    assert part.count(remarks) == 3 * len(facts["results"])
    assert part.count("<b>exact</b>") == len(facts["results"])


def test_every_figure_of_the_report_is_on_the_page_and_no_other(sample):
    _, facts, html = sample
    shown = {float(value) for value in re.findall(r'data-value="([^"]+)"', html)}
    everything = set(numbers(facts)) | {
        value for model in facts["results"] for value in numbers(layers_of(sample, model))
    }
    assert shown <= everything
    for model in (facts["reference"], *facts["results"]):
        keys = [metric["key"] for metric in facts["metrics"]]
        sizes = [
            "model_bytes",
            "bits_per_weight",
            "latency_s",
            "latency_p95_s",
            "latency_ratio",
            "peak_bytes",
            "seconds_quantize",
        ]
        wanted = [model.get(name) for name in (*keys, *sizes)] + [
            edge for key in keys for edge in model[f"{key}_interval"] or ()
        ]
        assert {value for value in wanted if value is not None} <= shown
    assert facts["results"][0]["trajectory"][-1] in shown


def numbers(data):
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        return [value for item in data for value in numbers(item)]
    return [float(data)] if isinstance(data, int | float) and not isinstance(data, bool) else []


def layers_of(sample, model):
    return read_json(sample[0] / "layers" / f"{model['folder']}.json", "layer-report")


def test_what_people_read_is_the_value_rounded(sample):
    _, _, html = sample
    pairs = re.findall(r'data-value="([^"]+)">([^<]+)<', html)
    scales = (1, 1e-3, 1e6)
    assert len(pairs) > 50
    for value, text in pairs:
        assert any(float(text) == pytest.approx(float(value) / scale, rel=0.06, abs=0.06) for scale in scales), (
            value,
            text,
        )


def test_texts_are_escaped(sample):
    _, _, html = sample
    assert "<script>alert(1)</script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "a large red circle &lt;0&gt; &amp; a blue square" in html
    data = html.split('<script id="data" type="application/json">')[1].split("</script>")[0]
    assert json.loads(data)["prompts"][0]["text"] == "a large red circle <0> & a blue square"


def test_pictures_are_the_files(sample):
    folder, facts, html = sample
    for place, model in enumerate((facts["reference"], *facts["results"])):
        for prompt in range(3):
            uri = re.search(rf'id="p-{place}-{prompt}"[^>]*src="data:image/png;base64,([^"]+)"', html)[1]
            assert (
                page_pictures.base64.b64decode(uri)
                == (folder / "images" / model["folder"] / f"{prompt:04d}.png").read_bytes()
            )


def test_equal_folders_give_equal_pages(tmp_path):
    for name in ("a", "b"):
        write_sample(tmp_path / name, names=("rtn",), blocks=1)
    one, two = (write_page(tmp_path / name).read_bytes() for name in ("a", "b"))
    assert one == two


def test_folders_of_pictures_have_a_page_without_models(tmp_path):
    facts = write_sample(tmp_path, names=("b",), prompts=1)
    unknown = {
        "recipe": None,
        "quantized": False,
        "trajectory": None,
        "trajectory_interval": None,
        "attributes": None,
        "psnr_db_interval": None,
    }
    sizes = dict.fromkeys(
        (
            "model_bytes",
            "bits_per_weight",
            "bits_per_quantized_weight",
            "latency_s",
            "latency_p95_s",
            "latency_ratio",
            "peak_bytes",
            "seconds_quantize",
        )
    )
    facts |= {
        "source": "folders",
        "settings": {"folders": ["A", "B"]},
        "noise_floor": None,
        "differences": [],
        "methods": [],
        "trajectory_sigma": None,
    }
    facts |= {"reference": {**facts["reference"], **sizes}, "results": [{**facts["results"][0], **unknown, **sizes}]}
    facts["prompts"] = [{"index": 0, "name": "cat", "text": None}]
    write_json(tmp_path / "report.json", "evaluation", facts)
    html = write_page(tmp_path).read_text("utf-8")
    assert [name for name in SECTIONS if f'id="{name}"' in html] == list(SECTIONS)
    assert "Pictures compared" in html
    assert ">cat<" in html.replace("cat <span", "cat<span")
    assert "MB" not in html.split('id="summary"')[1].split("</section>")[0]


def test_large_pictures_are_reduced_and_too_many_are_left_out(tmp_path):
    folder, side = tmp_path / "images" / "m", 500
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    for i in range(9):
        Image.fromarray(noise).save(folder / f"{i:04d}.png")
    models = [{"name": "m", "folder": "m", "each": {"psnr_db": [5.0, 1.0, 9.0, 4.0, 3.0, 6.0, 7.0, 8.0, 2.0]}}]
    prompts = [{"index": i} for i in range(9)]
    everything = page_pictures.embed(tmp_path, models, prompts)
    assert (everything.shown, everything.size, everything.reduced) == (list(range(9)), (384, 384), True)
    one = len(page_pictures.base64.b64decode(everything.uris[0][0].split(",")[1]))
    some = page_pictures.embed(tmp_path, models, prompts, budget=3 * one)
    assert some.shown == [0, 1, 2]  # the middle one, the worst and the best
    assert "3 of 9 prompts" in page_pictures.limits({"prompts": prompts}, some)


def test_damaged_and_missing_files_are_one_clear_error(tmp_path):
    write_sample(tmp_path, names=("rtn",))
    picture = tmp_path / "images" / "rtn" / "0001.png"
    picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(ArtifactError, match=r"0001\.png: not readable as a picture"):
        write_page(tmp_path)
    picture.unlink()
    with pytest.raises(ArtifactError, match=r"0001\.png: No such file"):
        write_page(tmp_path)
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ArtifactError, match="kind"):
        write_page(tmp_path)


def test_an_incomplete_report_is_one_clear_error(tmp_path):
    facts = write_sample(tmp_path, names=("rtn",))
    del facts["metrics"]
    write_json(tmp_path / "report.json", "evaluation", facts)
    with pytest.raises(ArtifactError, match=r"report\.json: incomplete .*metrics.*run the evaluation again"):
        write_page(tmp_path)


def test_counts_of_codes_are_counts(tmp_path):
    write_sample(tmp_path, names=("rtn",))
    path = tmp_path / "layers" / "rtn.json"
    facts = read_json(path, "layer-report")
    facts["layers"][0]["codes"]["count"][0] = 1e308
    write_json(path, "layer-report", {key: value for key, value in facts.items() if key not in ("kind", "version")})
    with pytest.raises(ArtifactError, match=r"rtn\.json: .*codes.count\[0\] is 1e\+308, expected a whole number"):
        write_page(tmp_path)


@pytest.mark.parametrize(
    ("points", "higher", "front"),
    [
        ([(3, 30), (2, 20), (1, 25)], True, [2, 0]),
        ([(3, 30), (2, 20), (1, 25)], False, [2, 1]),
        ([(1, 5), (1, 6)], True, [1]),
        ([(1, 5), (1, 5)], True, [0, 1]),
    ],
)
def test_the_front_has_what_no_other_beats(points, higher, front):
    assert page_plots.pareto(points, higher) == front


def test_kinds_are_paths_without_their_numbers():
    assert kind("m.0.image.attn.layers.1") == kind("m.11.image.attn.layers.1") == "image.attn.layers.*"
    assert kind("final_layer.linear") == "final_layer.linear"


@pytest.mark.parametrize(
    ("value", "text"),
    [(30.123, "30.12"), (0.97123, "0.9712"), (0.0000123, "1.23e-05"), (0.0, "0.0000"), (-3.2, "-3.2000")],
)
def test_numbers_keep_what_counts(value, text):
    assert plain(value) == text
