"""What an encoder-decoder can be trusted to do on packed rows; see ``abilities.py``, which asks other models."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..layout import IGNORE
from .abilities import Abilities, reason_of, same_cache
from .attachment import evaluation_mode
from .cache import content
from .cache_names import CACHE_NAME, CACHE_NAMES, cache_in
from .encoder_decoder import PairRunner, plain_head, planned_pairs
from .expectations import ITEMS, Expectations, Sample
from .known_attention import sees_distances
from .request import Request, Target
from .shared_state import SharedState
from .structure import is_plain_linear, why_never_packed


class PairSample(Sample):
    """Three short sources behind a prompt of three tokens, and their targets.

    Attributes:
        targets: ``[3, 4]``, token ids for the decoder.
        target_labels: ``[3, 4]``, padded on the right, one more ignored.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.targets = self.ids.flip(1)[:, :4].contiguous()
        padding = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]], device=self.ids.device)
        padding[0, 1] = 1
        self.target_labels = self.ids[:, :4].masked_fill(padding == 1, IGNORE)


@dataclass(eq=False)
class PairExpectations(Expectations):
    """What an untouched encoder-decoder gives.

    Attributes:
        encoded: for each mask the encoder's last hidden states, or None where it gives none.
        cache_with_labels: see Abilities.
    """

    sample: PairSample
    encoded: dict = field(default_factory=dict)
    cache_with_labels: bool = False

    @classmethod
    def _of(cls, base, backbone, is_lm, wide):
        with wide or nullcontext():
            sample = PairSample(base)
            parameters = frozenset(inspect.signature(base.forward).parameters)
            found = cls(sample, wide, base.get_input_embeddings().weight.dtype, parameters)
            for name in ("right", "full"):
                output: Any = sample.run(base, sample.masks[name], decoder_input_ids=sample.targets)
                found.outputs[name], found.encoded[name] = output.logits, output.encoder_last_hidden_state
            alone = sample.run(base, sample.masks["right"][:1], decoder_input_ids=sample.targets[:1])
            found.spread = found._spread(alone["logits"])
            for items in (None, ITEMS):
                extra = {} if items is None else {"num_items_in_batch": items}
                try:
                    output = sample.run(
                        base, sample.masks["right"], labels=sample.target_labels, use_cache=True, **extra
                    )
                    found.losses[items] = output.loss
                    found.cache_with_labels = cache_in(output) is not None
                except Exception as error:
                    found.losses[items] = f"{type(base).__name__} with labels raises {type(error).__name__}: {error}"
            output = sample.run(base, sample.masks["right"], decoder_input_ids=sample.targets, use_cache=True)
            found.cache_name = next((name for name in CACHE_NAMES if output.get(name) is not None), CACHE_NAME)
            found.cache = cache_in(output)
            found.head_is_linear = _head_is_linear(base, sample)
        return found

    @classmethod
    def _behind_prefix(cls, base, forward, padding, wide):
        with wide or nullcontext():
            sample = PairSample(base)
            found = cls(sample, wide, base.get_input_embeddings().weight.dtype, frozenset())
            given = dict(input_ids=sample.ids, attention_mask=sample.masks["right"], decoder_input_ids=sample.targets)
            found.outputs["right"] = forward(**given).logits
            found.spread = found._spread(forward(**{name: x[:1] for name, x in given.items()}).logits)
        return found

    def why_not_behind(self, runner: PairRunner, found: Abilities, shared: Callable[[], SharedState]) -> str | None:
        """None if packed rows behind learned keys and values give the expected output, else what differs."""
        sample = self.sample
        target = Target(sample.targets)
        mask = sample.masks["right"]
        with self.arithmetic():
            request = Request(sample.ids, 0, shared=shared(), attention_mask=mask, target=target)
            output = runner.run(request, target, planned_pairs(request, target), lambda x: x, found)
        return self.difference(output.logits, self.outputs["right"], None)


@dataclass(eq=False)
class PairProbe:
    """Asks one encoder-decoder: :meth:`expect` while it is untouched, :meth:`abilities` once it is attached."""

    base: PreTrainedModel
    is_lm: bool = field(init=False)
    expected: Any = field(init=False)

    def __post_init__(self) -> None:
        self.is_lm = self.base.get_output_embeddings() is not None and self.base.can_generate()

    @torch.no_grad()
    def expect(self) -> str | None:
        """Ask the untouched model; the reason why it can never be packed, or None."""
        encoder, decoder = self.base.get_encoder(), self.base.get_decoder()
        if not self.is_lm:
            return "it is an encoder-decoder with another head than a language model's"
        if encoder is self.base or decoder is self.base or encoder is decoder:
            return "it is an encoder-decoder whose two parts are not known apart"
        for part in (encoder, decoder):
            reason = why_never_packed(self.base, part, sees_distances(part))
            if reason is not None:
                return reason
        with evaluation_mode(self.base):
            self.expected = PairExpectations.of(self.base, decoder, self.is_lm)
        return self.expected.refusal

    @torch.no_grad()
    def abilities(self) -> Abilities:
        """Compare what the attached model gives on packed rows."""
        found = Abilities(is_lm=True, layout="packed", cache_name=self.expected.cache_name)
        with evaluation_mode(self.base):
            for name in ("right", "full"):
                try:
                    reason = self._differs(name, found)
                except Exception as error:  # a model can fail in any way on rows it was not written for
                    reason = reason_of(self.base, error)
                if reason is not None:
                    return Abilities(reason, is_lm=True)
            head = self.base.get_output_embeddings()
            losses = self.expected.losses
            return replace(
                found,
                returns_cache=self.expected.cache is not None,
                makes_cache=self._makes_cache(found),
                cache_name=self.expected.cache_name,
                cache_with_labels=self.expected.cache_with_labels,
                plain_head=is_plain_linear(head) and self.expected.head_is_linear,
                own_loss=self._own_loss(None, found),
                own_loss_of_items=self._own_loss(ITEMS, found),
                ignores_items=isinstance(losses[ITEMS], torch.Tensor)
                and isinstance(losses[None], torch.Tensor)
                and self._same(losses[ITEMS], losses[None]),
            )

    def runner(self, abilities: Abilities) -> PairRunner:
        return PairRunner.of(self.base)

    def _differs(self, name, found):
        """None if packed rows give the model's own output under a mask, else what differs."""
        sample, expected = self.expected.sample, self.expected
        output = self._packed(name, found)
        if expected.encoded[name] is not None:
            real = sample.real(sample.masks[name])
            reason = expected.difference(output.encoder_last_hidden_state, expected.encoded[name], real)
            if reason is not None:
                return reason
        return expected.difference(output.logits, expected.outputs[name], None)

    def _makes_cache(self, found):
        """Do packed rows leave the cache that the untouched model returned?"""
        theirs, sample = self.expected.cache, self.expected.sample
        if not isinstance(theirs, EncoderDecoderCache):
            return False
        try:
            ours = cache_in(self._packed("right", found, with_cache=True))
            parts = [(x.self_attention_cache, x.cross_attention_cache) for x in (ours, theirs)]
            got, wanted = ([content(part) for part in pair] for pair in parts)
        except Exception:  # attention modules without the index of their layer
            return False
        masks = torch.ones_like(sample.targets).bool(), sample.real(sample.masks["right"])
        return all(same_cache(self.expected, *caches) for caches in zip(got, wanted, masks))

    def _own_loss(self, items, found):
        """None if packed rows give the model's own loss, in evaluation and in training, else what is different."""
        expected = self.expected.losses[items]
        if isinstance(expected, str):
            return expected
        for training in (False, True):
            try:
                loss = self._packed("right", found, self.expected.sample.target_labels, items, training).loss
            except Exception as error:  # as above
                return reason_of(self.base, error)
            if not self._same(loss, expected):
                return f"{type(self.base).__name__} computes a loss of its own"
        return None

    def _same(self, loss, other):
        return self.expected.difference(loss.reshape(1, 1), other.reshape(1, 1), None) is None

    def _packed(self, name, found, labels=None, items=None, training=False, with_cache=False):
        """The attached model's output on the sample's packed rows."""
        sample = self.expected.sample
        target = Target(sample.targets if labels is None else None)
        request = Request(
            tokens=sample.embeds,
            num_virtual_tokens=len(sample.prompt),
            prompts=lambda: sample.prompt,
            attention_mask=sample.masks[name],
            target=target,
            labels=labels,
            num_items_in_batch=items,
            training=training,
        )
        with self.expected.arithmetic():
            plan = planned_pairs(request, target)
            return self.runner(found).run(request, target, plan, lambda x: x, found, with_cache)


def _head_is_linear(base, sample):
    """Are the logits those of :func:`plain_head` alone? As ``expectations.py`` asks."""
    runner = PairRunner.of(base)
    try:
        weight, bias, scale = plain_head(base)
        generator = torch.Generator(weight.device).manual_seed(0)
        hidden = 1e3 * torch.randn(4, weight.shape[1], device=weight.device, generator=generator)
        hidden = hidden.to(weight.dtype)
        logits = runner.head(
            BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden[None]), hidden, sample.embeds[:1]
        ).logits[0]
        expected = torch.nn.functional.linear(hidden * scale, weight, bias)
    except Exception:  # a head that does more than read hidden states
        return False
    close = torch.allclose(logits, expected.to(logits.dtype), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    return logits.shape == expected.shape and close
