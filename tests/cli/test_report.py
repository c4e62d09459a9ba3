"""report.html: complete, self-contained, and safe whatever the jobs' data say."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest

from lorafusion_jax.report import charts, write_report
from lorafusion_jax.report.markup import document, el
from lorafusion_jax.train.run_folder import open_run

HOSTILE = (
    "</pre></main><script>document.title='owned'</script>"
    "<img src=x onerror=\"document.title='owned'\">&lt;b&gt;\x00\ud800]]>--><style>*{display:none}"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Outline(html.parser.HTMLParser):
    """Collects tags, attributes and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def problems_of(page: str) -> list[str]:
    """Says what makes a page leave the disk or run something."""
    outline = Outline(page)
    found = [f"tag {t}" for t in outline.tags if t in ("script", "iframe", "object", "base", "a")]
    for name, value in outline.attributes:
        if name.startswith("on") or name in ("src", "href", "action", "style"):
            found.append(f"attribute {name}={value}")
    styles = re.findall(r"<style>(.*?)</style>", page, re.S)
    found += [f"style loads {s}" for style in styles for s in re.findall(r"url\(|@import", style)]
    return found


@pytest.fixture
def finished_run(trained):
    """The run folder as the train command left it; not to be changed."""
    return trained[1]


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a finished run, to be changed."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def test_training_writes_the_report(finished_run):
    page = (finished_run / "report.html").read_text()
    assert not problems_of(page)
    outline = Outline(page)
    text = " ".join(outline.texts)
    for name in ("numbers", "chat", "plain"):
        assert f"{name} done after" in text and outline.texts.count(name) >= 3
    for words in (
        "Utilisation",
        "Packing",
        "Samples",
        "expected:",
        "tokens_per_microbatch",
        "jaxlib",
    ):
        assert words in text
    assert outline.tags.count("svg") > 6 and outline.tags.count("h1") == 1
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in (
        outline.attributes
    )


def test_every_drawn_number_is_the_metrics_own(finished_run):
    page = (finished_run / "report.html").read_text()
    last = [
        record["eval_loss"]
        for record in open_run(finished_run).metrics("numbers")
        if record.get("eval_loss") is not None
    ][-1]
    assert f"<td>{last:.4f}</td>" in page and f"numbers, {last:.4g} at the end" in page


def test_hostile_data_stay_text(run):
    (run / "jobs/chat/samples.md").write_text(HOSTILE, errors="surrogatepass")
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps({"event": "Notice", "time": 0.0, "message": HOSTILE}) + "\n")
    environment = json.loads((run / "environment.json").read_text())
    environment["command"].append(HOSTILE)
    (run / "environment.json").write_text(json.dumps(environment))
    config = run / "config.resolved.yaml"
    config.write_text(config.read_text() + f"# {HOSTILE.split('&')[0]}\n")
    page = write_report(open_run(run)).read_text(encoding="utf-8")
    assert not problems_of(page)
    assert page.count("document.title='owned'") >= 6  # there, as text
    assert page.count("<style>") == 1 and "\x00" not in page


def test_sweeps_are_compared(run):
    rows = [{"job": "a", "lora.r": 8, "best_loss": 1.25}, {"job": "<b>", "lora.r": 4}]
    (run / "sweep.json").write_text(json.dumps({"chat": rows}))
    page = write_report(open_run(run)).read_text()
    assert "<h2>Sweeps</h2>" in page and '<th scope="col">lora.r</th>' in page
    assert "&lt;b&gt;" in page and not problems_of(page)


def test_check_of_the_page_catches_markup():
    tree = el("main", el("p", HOSTILE), el("p", title=HOSTILE))
    assert not problems_of(document(tree, title=HOSTILE))
    for bad in (f"<p>{HOSTILE}</p>", "<p onclick='x()'>", "<img src='https://example.org/x.png'>"):
        assert problems_of(bad)
    assert problems_of("<style>p{background:url(x)}</style>")


def test_report_of_a_run_that_has_just_begun(run, lorafusion):
    shutil.rmtree(run / "jobs")
    (run / "jobs/numbers").mkdir(parents=True)
    (run / "jobs/numbers/metrics.jsonl").write_text(
        '{"step": 1, "loss": null, "applied": false, "microbatch": 0, "time": 1.0, "tokens": 3}\n'
    )
    (run / "events.jsonl").unlink()
    (run / "plan.json").unlink()
    code, out, _ = lorafusion("report", run)
    assert code == 0 and str(run / "report.html") in out
    page = (run / "report.html").read_text()
    assert "nothing measured yet" in page and not problems_of(page)


def test_report_of_no_run_is_refused(tmp_path, lorafusion):
    code, _, err = lorafusion("report", tmp_path)
    assert code == 2 and "holds no run" in err and not list(tmp_path.iterdir())


def test_starting_over_removes_the_report(run):
    open_run(run).remove_run()
    assert not [path for path in run.iterdir() if path.name != ".lock"]


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.9, 3.1, [1, 1.5, 2, 2.5, 3]), (5, 5, [5])],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_many_points_are_averaged():
    points = [(float(i), float(i % 2)) for i in range(4000)]
    assert len(charts.thinned(points)) == 400
    assert {y for _, y in charts.thinned(points)} == {0.5}
    assert charts.thinned(points[:400]) == points[:400]


def test_opens_in_a_browser(run, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("chromium is not installed")
    (run / "jobs/chat/samples.md").write_text(HOSTILE, errors="surrogatepass")
    path = write_report(open_run(run))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --virtual-time-budget=2000"
    ).split()
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    outline = Outline(done.stdout)
    assert outline.tags.count("svg") > 6 and "Packing" in outline.texts
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title and title[1] == "run"  # no script of the sample's has run
    assert "script" not in outline.tags
