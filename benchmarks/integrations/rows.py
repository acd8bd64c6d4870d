"""The rows of the table."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import peft
import torch
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from . import trainers
from .distributed import two_processes
from .loops import (
    LossOfPadding,
    OwnLoss,
    Run,
    accelerate_loop,
    add_adapters,
    loop,
    loss_by_row,
    loss_of,
    loss_of_last_logits,
    loss_of_logits,
    loss_row_by_row,
)
from .setting import METHODS, Setting

BOTH = ("Prompt Tuning", "Prefix-Tuning")
Train = Callable[[Setting, str, bool], Run]


@dataclass(frozen=True)
class Row:
    """One thing to try.

    Attributes:
        group, name: where it stands in the table.
        train: by PEFT (False) or accelerated (True).
        reference: what PEFT is given in its place where it raises.
        against: the same in words.
        peft_is_wrong: it gives another number than was asked for; ``reference`` gives that.
        needs: packages.
        tolerance: of the losses, relative.
        methods: for which it is tried.
    """

    group: str
    name: str
    train: Train
    reference: Train | None = None
    against: str = ""
    peft_is_wrong: bool = False
    needs: tuple[str, ...] = ()
    tolerance: float = 1e-4
    methods: tuple[str, ...] = BOTH


def rows() -> list[Row]:
    """All of them, in the order of the table."""
    return [*_trainers(), *_collators(), *_bases(), *_settings(), *_calls(), *_methods()]


def _trainers():
    row, plain = partial(Row, "Trainers"), dict(gradient_checkpointing=False)
    without = dict(needs=("trl",), against="PEFT without checkpointing")
    return [
        row("a training loop", loop),
        row("Accelerate, with accumulation", accelerate_loop),
        row("DDP, two processes", partial(two_processes, kind="DDP")),
        row("FSDP2, two processes", partial(two_processes, kind="FSDP2")),
        row("transformers `Trainer`", trainers.transformers_trainer),
        row("TRL `SFTTrainer`", trainers.sft, partial(trainers.sft, **plain), **without),
        row("TRL `DPOTrainer`", trainers.dpo, partial(trainers.dpo, **plain), **without),
        row("TRL `KTOTrainer`", trainers.kto, partial(trainers.kto, **plain), **without),
        row("TRL `GRPOTrainer`", trainers.grpo, partial(trainers.grpo, **plain), **without),
    ]


def _collators():
    trainer = trainers.transformers_trainer
    sft = partial(trainers.sft, gradient_checkpointing=False)
    row = partial(Row, "Collators")
    padded = dict(reference=trainer, against="PEFT on the padded batch", peft_is_wrong=True)
    one_by_one = partial(trainers.sft_sample_by_sample, steps=1, gradient_checkpointing=False, max_length=16)
    return [
        row("padded right", trainer),
        row("padded left", partial(trainer, collator="left")),
        row("`DataCollatorForLanguageModeling`: labels on all tokens", partial(trainer, collator="all labels")),
        row("`DataCollatorWithFlattening`", partial(trainer, collator="flat"), **padded),
        row("the same with `return_flash_attn_kwargs`", partial(trainer, collator="flat with cu_seq_lens"), **padded),
        row("TRL, labels on all tokens", partial(sft, completion_only_loss=False), needs=("trl",)),
        row(
            "TRL `padding_free=True`",
            partial(sft, padding_free=True, max_length=None),
            sft,
            "PEFT on the padded batch",
            peft_is_wrong=True,
            needs=("trl",),
        ),
        row(
            'TRL `packing=True` ("bfd")',
            partial(sft, packing=True, max_length=16, whole_texts=True, steps=1),
            partial(one_by_one, packing=True),
            "PEFT, one sample a call",
            peft_is_wrong=True,
            needs=("trl",),
        ),
        row(
            'TRL `packing_strategy="wrapped"`: one sequence',
            partial(sft, packing=True, packing_strategy="wrapped", max_length=16, whole_texts=True),
            needs=("trl",),
        ),
    ]


def _bits(**options):
    return lambda setting: setting.base(quantization_config=BitsAndBytesConfig(**options), device_map="cpu")


def _prepared(setting):
    base = _bits(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)(setting)
    return peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def _outliers(setting):
    base = _bits(load_in_8bit=True)(setting)
    for layer in base.model.layers:
        layer.post_attention_layernorm.weight.data *= 10
    return base


def _torchao(dynamic):
    def base(setting):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

        config = Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
        return setting.base(quantization_config=TorchAoConfig(config), device_map="cpu")

    return base


def _quanto(setting):
    return setting.base(quantization_config=QuantoConfig(weights="int8"), device_map="cpu")


def _on_disk(setting):
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    return setting.base(device_map={**places, "model.layers.1": "disk"}, offload_folder=str(setting.folder / "disk"))


def _with_lora(setting):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, setting.base())


def _bases():
    row = partial(Row, "Frozen models")
    nf4 = _bits(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    bits, ao = ("bitsandbytes",), ("torchao",)
    # 8 bits of an activation are those of bf16, and the last bit of fp32 may decide how it is rounded.
    eight = dict(tolerance=5e-3)
    return [
        row("bitsandbytes, 4 bits (NF4)", partial(loop, base=nf4), needs=bits),
        row("the same, `prepare_model_for_kbit_training` before", partial(loop, base=_prepared), needs=bits),
        row("bitsandbytes, 8 bits (LLM.int8)", partial(loop, base=_bits(load_in_8bit=True)), needs=bits, **eight),
        row("the same, some activations above 6, its threshold", partial(loop, base=_outliers), needs=bits, **eight),
        row("torchao, weights of 8 bits", partial(loop, base=_torchao(dynamic=False)), needs=ao),
        row("torchao, weights and activations", partial(loop, base=_torchao(dynamic=True)), needs=ao, **eight),
        row("quanto, weights of 8 bits", partial(loop, base=_quanto), needs=("optimum.quanto",)),
        row("GGUF, 8 bits", partial(loop, base=Setting.gguf), needs=("gguf",)),
        row("a layer offloaded to the disk by Accelerate", partial(loop, base=_on_disk)),
        row("LoRA layers in the frozen model", partial(loop, base=_with_lora)),
        row("attention: eager", partial(loop, base=lambda setting: setting.base(attn_implementation="eager"))),
        row("a loss of its own", partial(loop, base=lambda setting: setting.base(kind=OwnLoss))),
        row("a loss of its own that looks at padding",
            partial(loop, base=lambda setting: setting.base(kind=LossOfPadding))),
    ]  # fmt: skip


def _checkpointing(reentrant):
    def prepare(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()

    return prepare


def _checkpointing_before(setting):
    base = setting.base()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    return base


def _settings():
    row, low = partial(Row, "Precision, memory, compilation"), dict(tolerance=2e-2)
    without = dict(reference=loop, against="PEFT without checkpointing")
    narrow = {name: partial(loop, base=lambda setting, dtype=dtype: setting.base(dtype=dtype))
              for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))}  # fmt: skip
    return [
        row("weights in bf16", narrow["bf16"], **low),
        row("weights in fp16", narrow["fp16"], **low),
        row("autocast to bf16", partial(loop, context=partial(torch.autocast, "cpu", torch.bfloat16)), **low),
        row("`Trainer(bf16=True)`", partial(trainers.transformers_trainer, bf16=True), **low),
        row("gradient checkpointing", partial(loop, prepare=_checkpointing(False)), **without),
        row("the same, reentrant", partial(loop, prepare=_checkpointing(True)), **without),
        row(
            "the same, switched on before `fastprompt.get_peft_model`",
            partial(loop, base=_checkpointing_before, by_get_peft_model=True),
            **without,
        ),
        row('`torch.compile(backend="aot_eager")`', partial(loop, wrap=partial(torch.compile, backend="aot_eager"))),
    ]


def _with(**options):
    return lambda model, batch: model(**batch, **options).loss


def _with_holes(setting):
    batches = setting.batches()
    for batch in batches:
        batch["attention_mask"][:, 1] = 0
    return batches


def _of_padding(setting):
    batches = setting.batches()
    for batch in batches:
        batch["labels"][batch["attention_mask"] == 0] = 3
    return batches


def _calls():
    row = partial(Row, "Calls")
    one_by_one = partial(loop, prepare=add_adapters, step=loss_row_by_row)
    return [
        row("a loss computed from `outputs.logits`", partial(loop, step=loss_of_logits)),
        row("`logits_to_keep`", partial(loop, step=loss_of_last_logits, batches=lambda s: s.batches("left"))),
        row(
            "`adapter_names`: an adapter for every row",
            partial(loop, prepare=add_adapters, step=loss_by_row),
            one_by_one,
            "PEFT, one row a call",
            peft_is_wrong=True,
        ),
        row("`num_items_in_batch`", partial(loop, step=_with(num_items_in_batch=7))),
        row("`return_dict=False`", partial(loop, step=lambda model, batch: model(**batch, return_dict=False)[0])),
        row("`output_hidden_states=True`", partial(loop, step=_with(output_hidden_states=True))),
        row("`output_attentions=True`", partial(loop, step=_with(output_attentions=True))),
        row("an attention mask with holes", partial(loop, batches=_with_holes)),
        row("labels on padding", partial(loop, batches=_of_padding)),
    ]


def _with_tasks(model, batch):
    return model(**batch, task_ids=torch.arange(len(batch["input_ids"])) % 2).loss


def _methods():
    steps = {"Multitask Prompt Tuning": _with_tasks}
    return [
        Row("Methods", name, partial(loop, step=steps.get(name, loss_of)), methods=(name,))
        for name in METHODS
        if name not in BOTH
    ]
