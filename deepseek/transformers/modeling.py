"""``DeepseekHybridForCausalLM``: our ``Transformer`` as a model of the library ``transformers``.

It adds no layer. It translates calls: an attention mask becomes rows without padding, labels become a loss,
and ``generate`` decodes with our caches. The tensors of a saved directory are our own names under ``model.``.

Padding is taken out rather than masked: windows and pooled blocks are counted from a row's first real token,
so a padded row gives exactly what the row alone would give.

Shape letters: B rows, T columns, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from deepseek.errors import ConfigError, WeightsError
from deepseek.models import Output, Transformer
from deepseek.nn.moe import MoE
from deepseek.transformers.cache import GenerationCache
from deepseek.transformers.configuration import DeepseekHybridConfig
from deepseek.weights.foreign import KEPT_FLOAT32
from deepseek.weights.hf_files import listed


class DeepseekHybridForCausalLM(PreTrainedModel, GenerationMixin):
    """Any model of this package, for ``from_pretrained``, ``generate``, ``save_pretrained`` and trainers."""

    config_class = DeepseekHybridConfig
    _no_split_modules = ("Block",)
    _keep_in_fp32_modules_strict = KEPT_FLOAT32
    runs_on = "deepseek"

    def __init__(self, config: DeepseekHybridConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config.shape)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As in ``transformers``, but a missing or left-over tensor is a ``WeightsError``, not a random
        weight.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(kind):
                names = listed(sorted(map(str, info[kind])))
                raise WeightsError(f"{pretrained_model_name_or_path}: {kind.replace('_', ' ')}: {names}")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        # The Transformer initialises itself; this only fills the buffer that is in no file.
        if isinstance(module, MoE) and "default_EC" in module._non_persistent_buffers_set:
            module.default_EC.zero_()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise ConfigError("the embeddings of this architecture are not exchangeable")

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.head

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        raise ConfigError(
            "the vocabulary of this architecture has a fixed size: set model.vocab_size before training"
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits ``[B, T, V]`` and, with ``labels [B, T]`` (-100: not counted), the next-token loss.

        While training, the balance loss of the expert layers is added to the loss and returned as
        ``aux_loss``.

        Args:
            attention_mask: ``[B, T]``, with a cache ``[B, columns seen + T]``; 0 marks padding, on any side.
            position_ids: as ``generate`` counts them; or, without mask and cache, positions that start again
                at 0 where packed documents begin.

        Raises:
            ConfigError: something asked for that this architecture does not do.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ConfigError("this architecture takes input_ids; inputs_embeds is not supported")
        if output_attentions or output_hidden_states:
            raise ConfigError("output_attentions and output_hidden_states are not supported")
        cache = self._cache(past_key_values, use_cache, labels)
        documents = _documents(position_ids, attention_mask, input_ids, cache)
        if documents is not None and position_ids is not None:
            cache = None
            output = self.model(input_ids, documents, position_ids.expand_as(input_ids))
            hidden, outputs = output.hidden, [output]
        else:
            hidden, outputs = self._hidden(input_ids, attention_mask, cache)
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits, balance, loss = self.model.logits(hidden), _balance(outputs), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
            if self.training and balance is not None:
                loss = loss + balance
        out = MoeCausalLMOutputWithPast(loss=loss, aux_loss=balance, logits=logits, past_key_values=cache)
        return out.to_tuple() if return_dict is False else out

    def _cache(self, given: Any, use_cache: bool | None, labels: Tensor | None) -> GenerationCache | None:
        """The cache of this call: the one given, a new one where wanted, or none."""
        if isinstance(given, GenerationCache):
            return given
        if given is not None:
            kind = type(given).__name__
            raise ConfigError(f"past_key_values is a {kind}; pass what the model returned, a GenerationCache")
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and labels is None and not self.training
        return GenerationCache() if use_cache else None

    def _hidden(
        self, tokens: Tensor, mask: Tensor | None, cache: GenerationCache | None
    ) -> tuple[Tensor, list[Output]]:
        """Hidden states ``[B, T, C]``, zeros at padding, and the outputs they came from."""
        real = _real(tokens, mask, cache.columns if cache is not None else 0)
        if cache is not None:
            return cache.run(self.model, tokens, real)
        if real is None or bool(real.all()):
            output = self.model(tokens)
            return output.hidden, [output]
        order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)  # real tokens first
        documents = real.gather(1, order).to(torch.int32) - 1
        output = self.model(tokens.gather(1, order), documents)
        hidden = output.hidden * (documents >= 0)[..., None].to(output.hidden.dtype)
        return torch.zeros_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden), [output]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            name = generation_config.cache_implementation
            raise ConfigError(f"cache_implementation={name!r} is not supported; leave it out")
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = GenerationCache()

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not bool(mask[:, -1].all()):
            raise ConfigError(
                "generate continues a row after its last column: pad prompts on the left, not on the right"
            )
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)


def _real(tokens: Tensor, mask: Tensor | None, start: int) -> Tensor | None:
    """Which of the new columns are tokens, bool ``[B, T]``."""
    if mask is None:
        return None
    want = (tokens.shape[0], start + tokens.shape[1])
    if mask.shape == tokens.shape and start:
        return mask.bool()
    if mask.shape != want:
        raise ConfigError(
            f"attention_mask is {list(mask.shape)}; it must be {list(want)}: [rows, columns seen and new]"
        )
    return mask[:, start:].bool()


def _documents(
    positions: Tensor | None, mask: Tensor | None, tokens: Tensor, cache: GenerationCache | None
) -> Tensor | None:
    """``None`` when the positions are the ones we count ourselves, else the packed documents they begin.

    Raises:
        ConfigError: they are neither.
    """
    if positions is None:
        return None
    start = cache.columns if cache is not None else 0
    columns = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
    if mask is not None and mask.shape[1] == start + tokens.shape[1]:
        wrong = (positions != (mask.long().cumsum(1) - 1)[:, start:]) & mask[:, start:].bool()
    else:
        wrong = positions != columns
    if not bool(wrong.any()):
        return None
    begins = positions == 0
    counted = columns - torch.where(begins, columns, 0).cummax(1).values
    if mask is None and start == 0 and bool(begins[:, 0].all()) and bool((positions == counted).all()):
        return (begins.cumsum(1) - 1).to(torch.int32).expand_as(tokens)
    raise ConfigError(
        "position_ids must count the real tokens of each row from 0, or start again at 0 with every packed "
        "document (then without attention_mask and cache)"
    )


def _balance(outputs: list[Output]) -> Tensor | None:
    """The sum of the expert layers' balance losses."""
    routings = [layer.routing for output in outputs for layer in output.layers if layer.routing is not None]
    return torch.stack([r.balance_loss for r in routings]).sum() if routings else None
