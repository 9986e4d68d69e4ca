"""Token ids that others made: checked against the model before they are used."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ...errors import TextError
from ..model.load import LanguageModel, ModelOutline

_ENOUGH = 32  # tokens of a document that say whether this model's tokenizer made them
_ALIKE = 0.5  # share of the tokens that must come back when their text is tokenised again


class GivenIds:
    """Documents of token ids, one after the other."""

    def __init__(self, model: LanguageModel | ModelOutline, dataset: str, column: str):
        self._model = model
        self._where = f"column '{column}' of {dataset}"
        self._compared = False

    def checked(self, number: int, ids: np.ndarray) -> np.ndarray:
        """The ids as int32, without padding at either end and without the BOS in front, which every row gets anyway.

        Raises:
            TextError: an id is not in the vocabulary, or the first document that is long enough was tokenised by
                another tokenizer.

        """
        model = self._model
        wrong = (ids < 0) | (ids >= model.vocab_size)
        if wrong.any():
            raise TextError(
                f"{self._where} holds token {ids[wrong.argmax()]} (document {number}), and the model's vocabulary has "
                f"tokens 0 to {model.vocab_size - 1}: it was tokenised for another model; give its text instead"
            )
        tokenizer = model.tokenizer
        pad = getattr(tokenizer, "pad_token_id", None)
        if pad is not None and pad not in (tokenizer.eos_token_id, model.bos_token_id):
            real = np.flatnonzero(ids != pad)
            ids = ids[real[0] : real[-1] + 1] if len(real) else ids[:0]
        if len(ids) and ids[0] == model.bos_token_id:
            ids = ids[1:]
        if not self._compared and len(ids) >= _ENOUGH:
            self._compared = True
            self._compare(ids[:1000].tolist())
        return ids.astype(np.int32)

    def _compare(self, ids: list[int]) -> None:
        tokenizer = self._model.tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        again = tokenizer(text, add_special_tokens=False)["input_ids"]
        alike = sum((Counter(ids) & Counter(again)).values()) / max(len(ids), len(again))
        if alike < _ALIKE:
            raise TextError(
                f"{self._where} holds tokens of another tokenizer: of those that this model's tokenizer makes of their "
                f"text, {alike:.0%} are the same; give the text instead, or the model it was tokenised for"
            )
