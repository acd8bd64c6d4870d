"""Tiny random-init encoder-decoders, and PEFT models and batches of them; as in ``tiny_models.py`` and ``parity.py``."""

import torch
import transformers as hf
from parity import peft_model, plain_step, step
from tiny_models import T5, VOCABULARY, drawn

import fastprompt

SOURCES, TARGETS = (9, 4, 1, 6), (5, 1, 6, 3)
B, S, T = 4, 9, 6
_BART = dict(
    vocab_size=VOCABULARY,
    d_model=48,
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_dim=80,
    decoder_ffn_dim=80,
    encoder_attention_heads=6,
    decoder_attention_heads=6,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    max_position_embeddings=20,  # fewer than a packed batch has rows
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
)
_GATED = dict(T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)

# name -> config
PAIRS = {
    "t5": hf.T5Config(**T5),
    "t5_scaled": hf.T5Config(**T5, scale_decoder_outputs=True, relative_attention_num_buckets=4, relative_attention_max_distance=6),
    "flan_t5": hf.T5Config(**_GATED),
    "mt5": hf.MT5Config(**_GATED),
    "umt5": hf.UMT5Config(**_GATED),
    "bart": hf.BartConfig(**_BART, scale_embedding=True),
    "mbart": hf.MBartConfig(**_BART),
    "plbart": hf.PLBartConfig(**_BART),
    "pegasus": hf.PegasusConfig(**_BART),
    "marian": hf.MarianConfig(**_BART),
    "blenderbot": hf.BlenderbotConfig(**_BART),
    "blenderbot_small": hf.BlenderbotSmallConfig(**_BART),
}


def build_pair(name, dtype=torch.float32, seed=0):
    """A model of :data:`PAIRS` in training mode."""
    torch.manual_seed(seed)
    model = drawn(hf.AutoModelForSeq2SeqLM.from_config(PAIRS[name]), seed)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model.to(dtype).train()
