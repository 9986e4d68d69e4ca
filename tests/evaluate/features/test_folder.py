"""The folder with every feature: its data files hold what the codes say, and a browser shows them from file://."""

import base64
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from browser import Tab, needs_browser
from coded_runs import WIDTH, coded, random_run
from stores import make_store
from synthetic import synthetic_report
from tcsae.cache.store import ActivationStore
from tcsae.errors import RunError, StoreError, UsageError
from tcsae.evaluate.codes.encode import EncodeConfig, encode_run
from tcsae.evaluate.codes.store import CodeStore
from tcsae.evaluate.features import catalogue
from tcsae.evaluate.features import folder as module
from tcsae.evaluate.features.catalogue import open_run
from tcsae.evaluate.features.folder import bucket, words_of, write_features
from tcsae.evaluate.report.page import write_report
from tcsae.evaluate.results import write_results
from tcsae.train.sae.protocol import SparseAutoencoder

WORDS = ["the", "federal", "government", "of", "</script>", "__proto__", "\u202eevil", "line\u2028end"]


def text(token: int) -> str:
    return " " + WORDS[token % len(WORDS)]


@pytest.fixture(scope="module", autouse=True)
def _words():
    """Texts of tokens without a tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "TokenTexts", lambda codes: text)
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[Path]:
    """A run and its twin, both encoded."""
    home = tmp_path_factory.mktemp("pair")
    tc, store = coded(home, rows=40, twin="twin")
    twin = random_run(home / "twin", store, seed=3, role="twin", twin="run")
    for run in (tc, twin):
        encode_run(EncodeConfig(str(run)))
    return [tc, twin]


@pytest.fixture(scope="module")
def written(pair, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reports") / "features"
    done = write_features([str(pair[0])], out=str(out))
    assert (done.runs, done.features) == (2, 2 * WIDTH)
    assert done.files == sum(file.is_file() for file in out.rglob("*"))
    assert done.n_bytes == sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return out


def data(folder: Path, key: str):
    call = (folder / "data" / f"{key}.js").read_text(encoding="utf-8")
    assert call.startswith(f'tcsaeData("{key}",')
    assert call.endswith(");\n")
    return json.loads(call[len(f'tcsaeData("{key}",') : -3])


def index(folder: Path):
    page = (folder / "index.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="index">(.*?)</script>', page, re.DOTALL)[1])


def test_columns_are_the_numbers_of_every_feature(pair, written):
    for at, run in enumerate(pair):
        numbers = open_run(str(run)).survey.numbers()
        assert index(written)["runs"][at]["columns"] == [*numbers, "match_cosine"]
        for name, values in numbers.items():
            found = np.frombuffer(base64.b64decode(data(written, f"{at}/c/{name}")), "<f4")
            np.testing.assert_array_equal(found, values)


def test_every_feature_is_there_with_its_passages(pair, written):
    (part,) = list(CodeStore.open(pair[0] / "codes.zarr"))
    for feature in range(WIDTH):
        file = data(written, f"0/f/{feature // 16}")
        card = file["f"][feature % 16]
        assert card["id"] == feature
        for p in card["p"]:
            z = part.dense_row(p["r"], np.array([feature]))[p["s"] : p["s"] + len(p["t"]), 0]
            np.testing.assert_array_equal(np.array(p["a"]) > 0, z > 0)
            np.testing.assert_allclose(np.array(p["a"]) / 100 * card["top"], z, atol=0.011 * card["top"])
            assert p["a"][p["k"]] == max(p["a"])
            tokens = part.tokens_RT[p["r"], p["s"] : p["s"] + len(p["t"])]
            assert [file["words"][word] for word in p["t"]] == [shown(t) for t in tokens]
        assert sum(count for _, count in card["h"]) == (part.feature_E == feature).sum()


def shown(token: int) -> str:
    from tcsae.evaluate.features.page_data import visible

    return visible(text(token))


def test_matches_are_the_nearest_decoder_rows_of_the_other_run(pair, written):
    rows = [np.asarray(SparseAutoencoder.load(run).W_dec.detach()) for run in pair]
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in rows]
    cosine = unit[0] @ unit[1].T
    for feature in range(WIDTH):
        ((other, match, value),) = data(written, f"0/f/{feature // 16}")["f"][feature % 16]["match"]
        assert (other, match) == (1, int(cosine[feature].argmax()))
        assert value == pytest.approx(cosine[feature].max(), rel=1e-2)


def test_rows_have_their_text_and_their_strongest_features(pair, written):
    (part,) = list(CodeStore.open(pair[1] / "codes.zarr"))
    for row in (0, 17, 39):
        file = data(written, f"1/d/{row // 16}")
        (found,) = [each for each in file["rows"] if each["r"] == row]
        assert [file["words"][word] for word in found["t"]] == [shown(token) for token in part.tokens_RT[row]]
        assert found["v"] == np.flatnonzero(part.flags_RT[row]).tolist()
        z_TF = part.dense_row(row, np.arange(WIDTH))
        assert {feature for feature, *_ in found["s"]} == set(np.flatnonzero(z_TF.any(0)).tolist())
        for feature, top, cells in found["s"]:
            at, level = np.array(cells).reshape(-1, 2).T
            np.testing.assert_array_equal(at, np.flatnonzero(z_TF[:, feature]))
            np.testing.assert_allclose(level / 100 * top, z_TF[at, feature], atol=0.011 * top)


def test_words_lead_to_features_that_fire_on_them(written):
    found = dict(data(written, "0/w/fe"))
    features = found["federal"][::2]
    assert features
    for feature in features:
        file = data(written, f"0/f/{feature // 16}")
        card = file["f"][feature % 16]
        assert any(
            file["words"][w] == " federal" and a >= 50 for p in card["p"] for w, a in zip(p["t"], p["a"], strict=True)
        )
    assert "fe" in index(written)["runs"][0]["words"]


def test_words_of_tokens():
    values = np.array([1.0, 3.0, 2.0, 0.5, 4.0])
    assert list(words_of([" The", " gover", "nment", ".\n\n", "It"], values)) == [
        ("the", 1.0), ("government", 3.0), ("it", 4.0)
    ]  # fmt: skip
    assert list(words_of(["don", "'t", " 3", ".5", " well-known"], values)) == [
        ("don't", 3.0), ("3.5", 2.0), ("well-known", 4.0)
    ]  # fmt: skip
    assert [word for word, _ in words_of([" The", " gover", "nment", ".\n\n", "It"], values, 3.0)] == [
        "government",
        "it",
    ]
    assert (bucket("federal"), bucket("a"), bucket("été"), bucket("'t")) == ("fe", "other", "other", "other")


def test_text_cannot_become_markup(written):
    page = (written / "index.html").read_text()
    assert page.count("</script>") == 2
    for file in (written / "data").rglob("*.js"):
        content = file.read_text(encoding="utf-8")
        assert "\u202e" not in content
        assert "\u2028" not in content


def test_the_same_codes_give_the_same_bytes(pair, written, tmp_path):
    write_features([str(pair[0])], out=str(tmp_path / "features"))
    for file in written.rglob("*"):
        if file.is_file():
            assert (tmp_path / "features" / file.relative_to(written)).read_bytes() == file.read_bytes()


def test_a_report_gets_the_page_and_links_it(pair, tmp_path):
    report = synthetic_report(features=24)
    write_results(report, tmp_path / "r")
    write_report(report, tmp_path / "r")
    assert "features/index.html" not in (tmp_path / "r" / "index.html").read_text()
    write_features([str(pair[0])], report=str(tmp_path / "r"))
    assert 'href="features/index.html"' in (tmp_path / "r" / "index.html").read_text()
    assert 'href="../index.html"' in (tmp_path / "r" / "features" / "index.html").read_text()
    with pytest.raises(RunError):
        write_features([str(pair[0])], report=str(tmp_path / "nothing"))


def test_what_is_in_the_way_is_left_alone(pair, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("my page")
    with pytest.raises(UsageError, match=r"mine holds other things \(index.html\): choose another --out"):
        write_features([str(pair[0])], out=str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "index.html").read_text() == "my page"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "index.html.0a1b2c3d.partial").write_text("killed while it wrote the page")
    write_features([str(pair[0])], out=str(tmp_path / "begun"))
    assert (tmp_path / "begun" / "index.html").is_file()
    assert not list((tmp_path / "begun").glob("*.partial"))
    bare = random_run(tmp_path / "bare", make_store(tmp_path))
    with pytest.raises(StoreError, match="there are no codes"):
        write_features([str(bare)], out=str(tmp_path / "features"))


def test_runs_on_different_text_are_not_shown_side_by_side(pair, tmp_path):
    path = make_store(tmp_path, rows=44, packing="concat", documents=6)
    assert ActivationStore.open(path).n_rows == 44
    other = random_run(tmp_path / "other", path)
    encode_run(EncodeConfig(str(other)))
    with pytest.raises(RunError, match=r"holds rows 0 to 40 of .*rows 0 to 44 .*: encode both over the same rows"):
        write_features([str(pair[0]), str(other)], out=str(tmp_path / "features"))


@pytest.mark.parametrize(("n_features", "most"), [(4096, 150_000), (16_384, 500_000), (65_536, 1_500_000)])
def test_the_list_of_a_wide_dictionary_stays_small(pair, tmp_path, n_features, most):
    """Beside it the page and the files of two features are read, which are as large whatever the width."""
    numbers = dict.fromkeys(open_run(str(pair[0])).survey.numbers(), np.random.default_rng(0).random(n_features))
    run = SimpleNamespace(codes=SimpleNamespace(n_rows=1), survey=SimpleNamespace(numbers=lambda: numbers))
    module._Folder(tmp_path, [run], 1)._columns(0, run, {})
    assert sum((tmp_path / f"data/0/c/{name}.js").stat().st_size for name in module.LISTED) < most


# --- in a browser


@pytest.fixture
def opened(tab, written) -> Tab:
    tab.width(1280)
    tab.open((written / "index.html").as_uri())
    tab.until("document.documentElement.dataset.features === 'ready'")
    tab.until("!!document.querySelector('.side h2')")
    return tab


def heading(tab) -> str:
    return tab.js("document.querySelector('.side h2').textContent")


def asked(tab) -> list[str]:
    urls = [event["params"]["request"]["url"].split("#")[0] for event in tab.said("Network.requestWillBeSent")]
    return [url.split("/data/")[1] for url in urls if "/data/" in url]


@needs_browser
def test_opening_loads_the_list_and_one_feature(opened):
    assert heading(opened) == "Feature 0"
    assert opened.said("Runtime.exceptionThrown", "Log.entryAdded") == []
    listed = {f"0/c/{name}.js" for name in module.LISTED}
    match = opened.js("Number(document.querySelectorAll('.side')[1].dataset.feature)")
    assert set(asked(opened)) == {*listed, "0/f/0.js", f"1/f/{match // 16}.js"}
    assert opened.js("document.querySelectorAll('.side').length") == 2


@needs_browser
def test_sorting_and_searching(opened, pair):
    numbers = open_run(str(pair[0])).survey.numbers()
    opened.put("#pick-order", "run_length", "change")
    best = int(
        np.argsort(np.where(np.isfinite(numbers["run_length"]), -numbers["run_length"], np.inf), kind="stable")[0]
    )
    opened.until(f"document.querySelector('.side h2').textContent === 'Feature {best}'")
    values = np.array(opened.js("[...document.querySelectorAll('#list-rows .option')].map(o => Number(o.dataset.id))"))
    found = numbers["run_length"][values]
    assert (np.diff(found[np.isfinite(found)]) <= 0).all()
    opened.put("#pick-text", "Federal", "input")
    opened.until("document.getElementById('pick-count').textContent.includes('by passages')")
    opened.put("#pick-text", "nowhere", "input")
    opened.until("document.querySelector('#sides').textContent === 'No feature matches.'")
    opened.put("#pick-text", "__proto__", "input")
    opened.until("document.getElementById('pick-count').textContent.startsWith('0 of') === false")
    opened.put("#pick-text", "21", "input")
    opened.until("document.querySelector('.side h2').textContent === 'Feature 21'")


@needs_browser
def test_addresses_lead_to_features_and_rows_and_survive_a_reload(tab, written):
    page = (written / "index.html").as_uri()
    for size in (1280, 768, 360):
        tab.width(size)
        tab.open(page + "#feature=21&run=1")
        tab.until("document.querySelector('.side h2')?.textContent === 'Feature 21'")
        assert tab.js("document.querySelector('.side').dataset.run") == "1"
        assert tab.js("document.getElementById('option-21').getAttribute('aria-selected')") == "true"
        assert tab.js("document.documentElement.scrollWidth <= innerWidth")
        tab.open(page + "#document=3")
        tab.until("document.querySelector('#document h2')?.textContent === 'Row 3'")
        assert tab.js("document.documentElement.scrollWidth <= innerWidth")
        assert tab.js("document.querySelectorAll('.strips').length") == 2
        assert tab.js("document.getElementById('document').getBoundingClientRect().top < innerHeight")
    tab.send("Page.reload")
    tab.until("document.querySelector('#document h2')?.textContent === 'Row 3'")
    assert tab.said("Runtime.exceptionThrown") == []


@needs_browser
def test_the_keyboard_reaches_everything(opened):
    for key, heading_ in (("j", "Feature 1"), ("j", "Feature 2"), ("k", "Feature 1")):
        opened.press(key)
        opened.until(f"document.querySelector('.side h2').textContent === '{heading_}'")
    assert opened.js("location.hash") == "#feature=1"
    opened.js("document.getElementById('list').focus()")
    opened.press("ArrowDown")
    opened.until("document.querySelector('.side h2').textContent === 'Feature 2'")
    opened.press("d")
    opened.until("!document.getElementById('document').hidden")
    row = opened.js("Number(document.getElementById('document').dataset.row)")
    assert opened.js("location.hash") == f"#document={row}"
    opened.press("f")
    opened.until("document.getElementById('document').hidden")
    assert heading(opened) == "Feature 2"
    opened.press("/")
    assert opened.js("document.activeElement.id") == "pick-text"
    opened.press("Escape")
    assert opened.js("document.activeElement.id") != "pick-text"


@needs_browser
def test_a_missing_file_is_a_sentence(tab, written, tmp_path):
    shutil.copytree(written, tmp_path / "cut")
    (tmp_path / "cut" / "data" / "0" / "f" / "1.js").unlink()
    tab.open((tmp_path / "cut" / "index.html").as_uri() + "#feature=17")
    tab.until("!!document.querySelector('#sides .failure')")
    assert tab.js("document.querySelector('#sides').textContent") == "data/0/f/1.js is not there: copy the whole folder"
