"""``--metric`` and ``--weights``: what does not fit is said before anything is loaded."""

import pytest

from mlxquant.errors import MlxQuantError
from mlxquant.evaluation.metric_options import chosen_metrics
from mlxquant.metrics import catalog

FILE = "weights-inception-2015-12-05-6726825d.pth"


def test_metrics_come_once_and_with_their_places(tmp_path):
    (tmp_path / FILE).touch()
    metrics, places = chosen_metrics(["kid", "fid", "kid", "psnr"], [f"fid={tmp_path}", f"kid={tmp_path / FILE}"])
    assert [metric.name for metric in metrics] == [*catalog.DEFAULT, "kid", "fid"]
    assert places == {"fid": tmp_path, "kid": tmp_path / FILE}
    assert chosen_metrics([], []) == ([catalog.metric(name) for name in catalog.DEFAULT], {})


@pytest.mark.parametrize(
    ("asked", "weights", "message"),
    [
        (["fid"], ["fid"], "--weights fid: expected METRIC=PATH"),
        (["fid"], ["fid="], "expected METRIC=PATH"),
        (["fid"], ["fad={here}"], "no metric 'fad'; there are psnr"),
        ([], ["psnr={here}"], "psnr looks through no network"),
        ([], ["fid={here}"], "fid is not measured; add --metric fid"),
        (
            ["fid"],
            ["fid={here}/none"],
            "fid={here}/none: no such file or folder; .* 'hf download toshas/torch-fidelity ",
        ),
        (["fid"], ["fid={here}"], f"{{here}}/{FILE} is missing; get it with 'hf download"),
        (["kid"], ["kid={here}/a.pth", "kid={here}/a.pth"], "kid has weights already, {here}/a.pth"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(tmp_path, asked, weights, message):
    (tmp_path / "a.pth").touch()
    with pytest.raises(MlxQuantError, match=message.format(here=tmp_path)):
        chosen_metrics(asked, [text.format(here=tmp_path) for text in weights])
