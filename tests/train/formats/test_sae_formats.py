"""Whatever an SAE's files say is honoured as the program they come from does, refused by name, or noted."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import pytest
import sae_formats
import torch
from sae_formats import CASES
from tcsae.errors import RunError
from tcsae.evaluate.made_for import made_for_notes
from tcsae.extract.config import ModelSource
from tcsae.extract.model.load import load_language_model
from tcsae.train.formats.locate import load_external

PAGE = Path(__file__).parents[3] / "docs" / "SAE_FORMATS.md"


@pytest.fixture(scope="module")
def a_model_of_layer_norms(tiny_gpt2):
    return load_language_model(ModelSource(id=str(tiny_gpt2), device="cpu", dtype="float32"))


def of(outcome):
    return [pytest.param(case, id=case.id) for case in CASES if case.outcome == outcome]


@torch.no_grad()
@pytest.mark.parametrize("case", of("honoured"))
def test_it_computes_what_the_other_program_computes(tmp_path, case):
    found = load_external(str(case.write(tmp_path / "sae")))
    assert (found.layer, found.site) == (case.expected.get("layer", 1), case.expected.get("site", "resid_post"))
    codes, reconstruction = case.computed(sae_formats.x())
    out = found.sae(sae_formats.x())
    assert (out.features > 0).any()
    assert (out.features == 0).any()
    torch.testing.assert_close(out.features, codes)
    torch.testing.assert_close(out.reconstruction, reconstruction)


@pytest.mark.parametrize("case", of("refused"))
def test_it_is_refused_by_name(tmp_path, case):
    with pytest.raises(RunError) as caught:
        load_external(str(case.write(tmp_path / "sae")))
    assert case.meaning in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", of("noted"))
def test_it_is_noted(tmp_path, case, a_model_of_layer_norms):
    found = load_external(str(case.write(tmp_path / "sae")))
    notes = made_for_notes(found.sae.metadata, a_model_of_layer_norms, context=8)
    assert case.meaning in " ".join(notes)


def test_what_fits_is_not_noted(a_model_of_layer_norms):
    lm = a_model_of_layer_norms
    same = {
        "model_name": f"someone/{Path(lm.identity.id).name}",
        "prepend_bos": True,
        "context_size": 8,
        "seqpos_slice": [None],
    }
    assert made_for_notes(same, lm, context=8) == ()
    assert made_for_notes({}, lm, context=8) == ()


# --- the programs themselves, where they are installed


def saelens(path):
    from sae_lens import SAE

    sae = SAE.load_from_disk(path)
    return lambda x: (sae.encode(x), sae(x))


def dictionary_learning(path):
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(path), device="cpu")
    return lambda x: (dictionary.encode(x), dictionary(x))


def sparsify(path):
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(path)

    def computed(x):
        top = coder.encode(x)
        codes = torch.zeros(len(x), coder.num_latents).scatter(-1, top.top_indices, top.top_acts)
        return codes, codes @ coder.W_dec + coder.b_dec  # its own decoder is a kernel for GPUs

    return computed


READERS = {
    "SAELens 6": ("sae_lens", saelens),
    "SAELens before 6": ("sae_lens", saelens),
    "dictionary_learning": ("dictionary_learning", dictionary_learning),
    "sparsify": ("sparsify", sparsify),
}
# Folders in the middle of training, which keep the largest codes of a batch (test_saelens_itself has their inference),
# and a class of another release.
NOT_READ = {"batchtopk", "matryoshka_batchtopk", "TemporalMatryoshkaBatchTopKSAE"}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [param for param in of("honoured") if param.values[0].format in READERS and
             param.values[0].value not in NOT_READ]
)  # fmt: skip
def test_the_program_itself_computes_that(tmp_path, case):
    module, reader = READERS[case.format]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(module)
        except ImportError:
            pytest.skip(f"{module} is not installed")
        path = case.write(tmp_path / "sae")
        codes, reconstruction = reader(path)(sae_formats.x())
    out = load_external(str(path)).sae(sae_formats.x())
    torch.testing.assert_close(out.features, codes.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.reconstruction, reconstruction.float(), rtol=1e-5, atol=1e-5)


def test_the_page_is_what_the_cases_say():
    assert PAGE.read_text(encoding="utf-8") == sae_formats.page()
