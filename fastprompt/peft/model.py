"""SoftPromptModel with checkpoints in PEFT's format."""

from os import PathLike

import torch
from transformers import PreTrainedModel

from ..hf import model
from ..hf.structure import is_encoder_decoder
from . import checkpoint

_TASK_TYPES = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}


class SoftPromptModel(model.SoftPromptModel):
    __doc__ = model.SoftPromptModel.__doc__

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write the prompts, and a head that trained along, in PEFT's adapter format; see :func:`checkpoint.save`."""
        checkpoint.save(directory, self.method, self.base.config, self._task_type(), self.trained_head())

    @classmethod
    def from_pretrained(cls, base: PreTrainedModel, directory: str | PathLike[str]) -> "SoftPromptModel":
        """``base`` with the prompts (and head) in ``directory``, written by PEFT or by :meth:`save_pretrained`."""
        method, head = checkpoint.load(directory), checkpoint.load_head(directory)
        unknown = sorted(head.keys() - dict(base.named_parameters()).keys())
        if unknown:
            raise ValueError(
                f"base must have the parameters {unknown} of the head that was saved, but has none of that name"
            )
        with torch.no_grad():
            for name, value in head.items():
                base.get_parameter(name).copy_(value)
        return cls(base, method)

    def _task_type(self):
        if is_encoder_decoder(self.base):
            return "SEQ_2_SEQ_LM"
        if self._engine.is_lm:
            return "CAUSAL_LM"
        name = type(self.base).__name__
        return next((kind for part, kind in _TASK_TYPES.items() if part in name), "FEATURE_EXTRACTION")
