"""The transformers half of the zoo: small configurations built in code, random weights, nothing downloaded.

Sizes that mean different things differ where a configuration allows it, so that two axes of one size are not mistaken for
one; every stack has two or three layers, and every grouped attention more query heads than key-value heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from dmscale.sources import allow_missing_torchvision_operators

from .entry import Entry

Inputs = dict[str, torch.Tensor]

TEXT = {"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 32}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}
LLAMA_LIKE = TEXT | IDS | HEADS | {"intermediate_size": 80, "head_dim": 8, "use_cache": False}
BERT_LIKE = TEXT | {"intermediate_size": 80, "num_attention_heads": 6}
VIT_LIKE = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
            "image_size": 32, "patch_size": 8}  # fmt: skip


def ids(length: int = 7, batch: int = 2) -> torch.Tensor:
    """Token ids (batch, length); the special ones of `IDS` do not occur."""
    return torch.randint(5, 50, (batch, length))


def text() -> Inputs:
    return {"input_ids": ids()}


def masked_text() -> Inputs:
    return {"input_ids": ids(), "attention_mask": torch.ones(2, 7).long()}


def text_pair() -> Inputs:
    return {"input_ids": ids(), "decoder_input_ids": ids(5)}


def image(size: int = 32) -> Inputs:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def waveform(samples: int = 800) -> Inputs:
    return {"input_values": torch.randn(2, samples)}


def image_and_text(size: int = 32) -> Inputs:
    return text() | image(size)


def _build(model: str, config: str, options: dict[str, Any], inputs: Callable[[], Inputs]) -> tuple[nn.Module, Inputs]:
    allow_missing_torchvision_operators()
    import transformers

    built = lively(getattr(transformers, model)(getattr(transformers, config)(**options)))
    if model in _HANDS_ON_PARAMETERS:
        built.requires_grad_(False)
    return built, inputs()


_HANDS_ON_PARAMETERS = ("DebertaForMaskedLM",)
"""Models that give a parameter to a module as its input: PyTorch's counter fails there on one that takes gradients."""


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """Weights of about the size that training gives them: with an initial 0.02 a wrong slice changes the output by 1e-6."""
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if p.dim() >= 2 and p.is_floating_point() and bool(p.any()):
                fan_in = math.prod(p.shape[1:]) if isinstance(module, nn.modules.conv._ConvNd) else p.shape[-1]
                p.div_(p.square().mean().sqrt() * math.sqrt(fan_in))
    return model


def _grouped_mm_flops(a: Sequence[int], b: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """2 T K M of rows (T, K), each with one of the matrices (G, K, M)."""
    return 2 * a[0] * a[1] * b[-1]


if torch.ops.aten._grouped_mm not in flop_registry:  # PyTorch's counter lacks it; mixtures of experts need it
    register_flop_formula(torch.ops.aten._grouped_mm)(_grouped_mm_flops)


def _entry(
    name: str, family: str, model: str, config: str, options: dict[str, Any], inputs: Callable[[], Inputs] = text
) -> Entry:
    return Entry(f"hf:{name}", f"transformers {family}", partial(_build, model, config, options, inputs))


def _decoder(name: str, prefix: str, options: dict[str, Any], family: str = "decoder") -> Entry:
    return _entry(name, family, f"{prefix}ForCausalLM", f"{prefix}Config", options)


def _clip_like(prefix: str) -> Callable[[], tuple[nn.Module, Inputs]]:
    def build() -> tuple[nn.Module, Inputs]:
        options = {
            "text_config": BERT_LIKE | {"vocab_size": 60, "projection_dim": 40, "eos_token_id": 1, "bos_token_id": 0},
            "vision_config": VIT_LIKE | {"hidden_size": 56, "num_attention_heads": 7, "projection_dim": 40},
        }
        if prefix != "Siglip":
            options["projection_dim"] = 40  # type: ignore[assignment]
        else:
            options["text_config"] |= {"projection_size": 56, "hidden_size": 48}
        return _build(f"{prefix}Model", f"{prefix}Config", options, image_and_text)

    return build


DECODERS = [
    _decoder("llama", "Llama", LLAMA_LIKE),
    _decoder("mistral", "Mistral", LLAMA_LIKE | {"sliding_window": 4}),
    _decoder("ministral", "Ministral", LLAMA_LIKE | {"sliding_window": 4}),
    _decoder("qwen2", "Qwen2", LLAMA_LIKE),
    _decoder("qwen3", "Qwen3", LLAMA_LIKE),
    _decoder("gemma", "Gemma", LLAMA_LIKE),
    _decoder("gemma2", "Gemma2", LLAMA_LIKE | {"query_pre_attn_scalar": 8, "sliding_window": 4}),
    _entry("gemma3", "decoder", "Gemma3ForCausalLM", "Gemma3TextConfig",
           LLAMA_LIKE | {"query_pre_attn_scalar": 8, "sliding_window": 4}),
    _decoder("olmo", "Olmo", LLAMA_LIKE),
    _decoder("olmo2", "Olmo2", LLAMA_LIKE),
    _decoder("gpt_neox", "GPTNeoX", TEXT | IDS | {"num_attention_heads": 6, "intermediate_size": 80, "rotary_pct": 1.0}),
    _entry("gpt2", "decoder", "GPT2LMHeadModel", "GPT2Config",
           {"vocab_size": 60, "n_embd": 48, "n_inner": 80, "n_layer": 3, "n_head": 6, "n_positions": 32} | IDS),
    _decoder(
        "gptj", "GPTJ",
        {"vocab_size": 60, "n_embd": 48, "n_inner": 80, "n_layer": 3, "n_head": 6, "n_positions": 32, "rotary_dim": 4} | IDS,
    ),
    _decoder("gpt_neo", "GPTNeo", {
        "vocab_size": 60, "hidden_size": 48, "intermediate_size": 80, "num_layers": 2, "num_heads": 6,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32, "window_size": 4,
    } | IDS),
    _decoder("gpt_bigcode", "GPTBigCode", {
        "vocab_size": 60, "n_embd": 48, "n_inner": 80, "n_layer": 3, "n_head": 6, "n_positions": 32, "multi_query": True,
    } | IDS),
    _decoder("codegen", "CodeGen", {
        "vocab_size": 60, "n_embd": 48, "n_inner": 80, "n_layer": 3, "n_head": 4, "n_positions": 32, "rotary_dim": 4,
    } | IDS),
    _decoder("stablelm", "StableLm", LLAMA_LIKE | {"partial_rotary_factor": 0.5}),
    _decoder("cohere", "Cohere", LLAMA_LIKE),
    _decoder("cohere2", "Cohere2", LLAMA_LIKE | {"sliding_window": 4}),
    _decoder("granite", "Granite", LLAMA_LIKE),
    _decoder("glm", "Glm", LLAMA_LIKE | {"partial_rotary_factor": 0.5}),
    _decoder("glm4", "Glm4", LLAMA_LIKE | {"partial_rotary_factor": 0.5}),
    _decoder("phi", "Phi", LLAMA_LIKE | {"partial_rotary_factor": 0.5}),
    _decoder("phi3", "Phi3", LLAMA_LIKE),
    _decoder("opt", "OPT", TEXT | IDS | {"ffn_dim": 80, "num_attention_heads": 6, "word_embed_proj_dim": 48}),
    _decoder("bloom", "Bloom", {"vocab_size": 60, "hidden_size": 48, "n_layer": 3, "n_head": 6} | IDS),
    _decoder("falcon", "Falcon", {
        "vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "ffn_hidden_size": 80,
        "multi_query": True,
    } | IDS),
    _decoder("falcon_grouped", "Falcon", {
        "vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "ffn_hidden_size": 80,
        "new_decoder_architecture": True, "num_kv_heads": 3,
    } | IDS),
    _decoder("mpt", "Mpt", {"vocab_size": 60, "d_model": 48, "n_layers": 3, "n_heads": 6, "expansion_ratio": 2,
                            "max_seq_len": 32} | IDS),
    _decoder("starcoder2", "Starcoder2", LLAMA_LIKE | {"sliding_window": 4}),
    _decoder("smollm3", "SmolLM3", LLAMA_LIKE | {"no_rope_layers": [1, 0, 1]}),
    _decoder("nemotron", "Nemotron", LLAMA_LIKE | {"partial_rotary_factor": 0.5}),
    _decoder("persimmon", "Persimmon", TEXT | IDS | {"num_attention_heads": 6, "intermediate_size": 80}),
    _decoder("xglm", "XGLM", {"vocab_size": 60, "d_model": 48, "num_layers": 3, "attention_heads": 6, "ffn_dim": 80,
                              "max_position_embeddings": 32} | IDS),
    _decoder("biogpt", "BioGpt", BERT_LIKE | IDS),
    _decoder("exaone4", "Exaone4", LLAMA_LIKE | {"sliding_window": 4}),
    _decoder("apertus", "Apertus", LLAMA_LIKE),
    _decoder("helium", "Helium", LLAMA_LIKE),
    _decoder("seed_oss", "SeedOss", LLAMA_LIKE),
    _decoder("ernie4_5", "Ernie4_5", LLAMA_LIKE),
    _decoder("diffllama", "DiffLlama", LLAMA_LIKE | {"num_attention_heads": 8, "num_key_value_heads": 4}),
    _decoder("modernbert_decoder", "ModernBertDecoder", BERT_LIKE | IDS | {"cls_token_id": 0, "sep_token_id": 1}),
]  # fmt: skip

LATENT = {
    "q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 12,
    "num_key_value_heads": 6, "head_dim": 6,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

MIXTURES = [
    _decoder("mixtral", "Mixtral", LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}, "mixture of experts"),
    _decoder("qwen2_moe", "Qwen2Moe", LLAMA_LIKE | EXPERTS | {"shared_expert_intermediate_size": 56}, "mixture of experts"),
    _decoder("qwen3_moe", "Qwen3Moe", LLAMA_LIKE | EXPERTS, "mixture of experts"),
    _decoder("olmoe", "Olmoe", LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2}, "mixture of experts"),
    _decoder("granitemoe", "GraniteMoe", LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}, "mixture of experts"),
    _decoder("phimoe", "Phimoe", LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}, "mixture of experts"),
    _decoder("gpt_oss", "GptOss", LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
             "mixture of experts"),
    _decoder("deepseek_v2", "DeepseekV2", LLAMA_LIKE | LATENT | {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy",
    }, "mixture of experts"),
    _decoder("deepseek_v3", "DeepseekV3", LLAMA_LIKE | LATENT | {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 1, "first_k_dense_replace": 1,
    }, "mixture of experts"),
    _entry("switch_transformers", "mixture of experts", "SwitchTransformersForConditionalGeneration",
           "SwitchTransformersConfig", {
               "vocab_size": 60, "d_model": 48, "d_kv": 8, "d_ff": 80, "num_layers": 2, "num_decoder_layers": 2,
               "num_heads": 6, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
           }, text_pair),
]  # fmt: skip

ENCODERS = [
    _entry("bert", "encoder", "BertForMaskedLM", "BertConfig", BERT_LIKE, masked_text),
    _entry("roberta", "encoder", "RobertaForMaskedLM", "RobertaConfig", BERT_LIKE, masked_text),
    _entry("distilbert", "encoder", "DistilBertForMaskedLM", "DistilBertConfig",
           {"vocab_size": 60, "dim": 48, "hidden_dim": 80, "n_layers": 3, "n_heads": 6, "max_position_embeddings": 32}),
    _entry("albert", "encoder", "AlbertForMaskedLM", "AlbertConfig", BERT_LIKE | {"embedding_size": 40}),
    _entry("deberta", "encoder", "DebertaForMaskedLM", "DebertaConfig",
           BERT_LIKE | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}),
    _entry("deberta_v2", "encoder", "DebertaV2ForMaskedLM", "DebertaV2Config",
           BERT_LIKE | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
                        "share_att_key": True, "norm_rel_ebd": "layer_norm"}),
    _entry("modernbert", "encoder", "ModernBertForMaskedLM", "ModernBertConfig",
           BERT_LIKE | IDS | {"cls_token_id": 0, "sep_token_id": 1, "local_attention": 4}),
    _entry("electra", "encoder", "ElectraForPreTraining", "ElectraConfig", BERT_LIKE | {"embedding_size": 40}),
    _entry("mpnet", "encoder", "MPNetForMaskedLM", "MPNetConfig", BERT_LIKE),
    _entry("roformer", "encoder", "RoFormerForMaskedLM", "RoFormerConfig", BERT_LIKE | {"embedding_size": 48}),
    _entry("convbert", "encoder", "ConvBertForMaskedLM", "ConvBertConfig",
           BERT_LIKE | {"embedding_size": 48, "num_groups": 1}),
    _entry("squeezebert", "encoder", "SqueezeBertForMaskedLM", "SqueezeBertConfig", BERT_LIKE | {"embedding_size": 48}),
    _entry("fnet", "encoder", "FNetForMaskedLM", "FNetConfig", BERT_LIKE),
    _entry("funnel", "encoder", "FunnelForMaskedLM", "FunnelConfig", {
        "vocab_size": 60, "block_sizes": [2, 2], "d_model": 48, "n_head": 6, "d_head": 8, "d_inner": 80,
    }),
    _entry("xlnet", "encoder", "XLNetLMHeadModel", "XLNetConfig",
           {"vocab_size": 60, "d_model": 48, "n_layer": 3, "n_head": 6, "d_inner": 80}),
]  # fmt: skip

SEQ2SEQ = {
    "vocab_size": 60, "d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 6,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 80, "decoder_ffn_dim": 72, "max_position_embeddings": 32,
    "decoder_start_token_id": 2, "forced_eos_token_id": 1,
} | IDS  # fmt: skip
T5_LIKE = {
    "vocab_size": 60, "d_model": 48, "d_kv": 8, "d_ff": 80, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 6,
}  # fmt: skip


def speech_features() -> Inputs:
    return {"input_features": torch.randn(2, 20, 32), "decoder_input_ids": ids(5)}


ENCODER_DECODERS = [
    _entry("t5", "encoder-decoder", "T5ForConditionalGeneration", "T5Config", T5_LIKE, text_pair),
    _entry("mt5", "encoder-decoder", "MT5ForConditionalGeneration", "MT5Config", T5_LIKE, text_pair),
    _entry("umt5", "encoder-decoder", "UMT5ForConditionalGeneration", "UMT5Config", T5_LIKE, text_pair),
    _entry("bart", "encoder-decoder", "BartForConditionalGeneration", "BartConfig", SEQ2SEQ, text_pair),
    _entry("mbart", "encoder-decoder", "MBartForConditionalGeneration", "MBartConfig", SEQ2SEQ, text_pair),
    _entry("pegasus", "encoder-decoder", "PegasusForConditionalGeneration", "PegasusConfig", SEQ2SEQ, text_pair),
    _entry("marian", "encoder-decoder", "MarianMTModel", "MarianConfig", SEQ2SEQ, text_pair),
    _entry("m2m_100", "encoder-decoder", "M2M100ForConditionalGeneration", "M2M100Config", SEQ2SEQ, text_pair),
    _entry("blenderbot", "encoder-decoder", "BlenderbotForConditionalGeneration", "BlenderbotConfig", SEQ2SEQ, text_pair),
    _entry("whisper", "encoder-decoder", "WhisperForConditionalGeneration", "WhisperConfig",
           SEQ2SEQ | {"num_mel_bins": 20, "max_source_positions": 16, "max_target_positions": 16}, speech_features),
]  # fmt: skip

STAGES = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "num_labels": 5}

VISION = [
    _entry("vit", "vision", "ViTForImageClassification", "ViTConfig", VIT_LIKE | {"num_labels": 5}, image),
    _entry("deit", "vision", "DeiTForImageClassification", "DeiTConfig", VIT_LIKE | {"num_labels": 5}, image),
    _entry("beit", "vision", "BeitForImageClassification", "BeitConfig",
           VIT_LIKE | {"num_labels": 5, "use_relative_position_bias": True}, image),
    _entry("data2vec_vision", "vision", "Data2VecVisionForImageClassification", "Data2VecVisionConfig",
           VIT_LIKE | {"num_labels": 5, "use_shared_relative_position_bias": True}, image),
    _entry("dinov2", "vision", "Dinov2ForImageClassification", "Dinov2Config",
           VIT_LIKE | {"num_labels": 5, "mlp_ratio": 2}, image),
    _entry("dinov2_swiglu", "vision", "Dinov2ForImageClassification", "Dinov2Config",
           VIT_LIKE | {"num_labels": 5, "mlp_ratio": 2, "use_swiglu_ffn": True}, image),
    _entry("dinov3_vit", "vision", "DINOv3ViTModel", "DINOv3ViTConfig", VIT_LIKE | {"num_register_tokens": 2}, image),
    _entry("vit_mae", "vision", "ViTMAEForPreTraining", "ViTMAEConfig", VIT_LIKE | {
        "decoder_hidden_size": 40, "decoder_num_attention_heads": 4, "decoder_num_hidden_layers": 2,
        "decoder_intermediate_size": 56}, lambda: image() | {"noise": torch.rand(2, 16)}),
    _entry("swin", "vision", "SwinForImageClassification", "SwinConfig", {
        "image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4,
        "num_labels": 5}, image),
    _entry("swinv2", "vision", "Swinv2ForImageClassification", "Swinv2Config", {
        "image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4,
        "num_labels": 5}, image),
    _entry("convnext", "vision", "ConvNextForImageClassification", "ConvNextConfig", STAGES, image),
    _entry("convnextv2", "vision", "ConvNextV2ForImageClassification", "ConvNextV2Config", STAGES, image),
    _entry("mobilevit", "vision", "MobileViTForImageClassification", "MobileViTConfig", {
        "image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 56],
        "num_attention_heads": 4, "num_labels": 5}, partial(image, 64)),
    _entry("mobilevitv2", "vision", "MobileViTV2ForImageClassification", "MobileViTV2Config",
           {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1], "num_labels": 5}, partial(image, 64)),
    _entry("segformer", "vision", "SegformerForSemanticSegmentation", "SegformerConfig", {
        "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 4, 4],
        "decoder_hidden_size": 40, "num_labels": 5}, partial(image, 64)),
    _entry("pvt_v2", "vision", "PvtV2ForImageClassification", "PvtV2Config", {
        "image_size": 64, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 4, 4],
        "num_labels": 5}, partial(image, 64)),
    _entry("detr", "vision", "DetrForObjectDetection", "DetrConfig", {
        "use_timm_backbone": False, "backbone": None, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 6, "decoder_attention_heads": 6, "encoder_ffn_dim": 80, "decoder_ffn_dim": 72,
        "num_queries": 5, "num_labels": 4, "use_pretrained_backbone": False,
        "backbone_config": {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 24, 32, 40],
                            "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage4"]},
    }, lambda: image(64) | {"pixel_mask": torch.ones(2, 64, 64).long()}),
    _entry("mask2former", "vision", "Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", {
        "feature_size": 32, "mask_feature_size": 40, "hidden_dim": 48, "encoder_feedforward_dim": 56,
        "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4, "dim_feedforward": 72, "num_queries": 5,
        "num_labels": 4, "backbone_config": {
            "model_type": "swin", "image_size": 64, "patch_size": 4, "embed_dim": 12, "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 4, 4], "window_size": 2, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    }, partial(image, 64)),
    _entry("yolos", "vision", "YolosForObjectDetection", "YolosConfig",
           VIT_LIKE | {"image_size": [32, 32], "num_detection_tokens": 4, "num_labels": 4}, image),
    _entry("dpt", "vision", "DPTForSemanticSegmentation", "DPTConfig", VIT_LIKE | {
        "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 16, 24, 32],
        "fusion_hidden_size": 40, "is_hybrid": False, "num_labels": 4}, image),
    _entry("resnet", "vision", "ResNetForImageClassification", "ResNetConfig", {
        "embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "layer_type": "basic",
        "num_labels": 5}, image),
    _entry("poolformer", "vision", "PoolFormerForImageClassification", "PoolFormerConfig", STAGES, image),
    _entry("levit", "vision", "LevitForImageClassification", "LevitConfig", {
        "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
        "key_dim": [8, 8, 8], "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2], "num_labels": 5}, partial(image, 64)),
]  # fmt: skip

WAV2VEC = BERT_LIKE | {
    "vocab_size": 30, "conv_dim": [24, 24, 24], "conv_stride": [5, 4, 2], "conv_kernel": [10, 4, 2],
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0, "apply_spec_augment": False,
}  # fmt: skip

AUDIO = [
    _entry("wav2vec2", "audio", "Wav2Vec2ForCTC", "Wav2Vec2Config", WAV2VEC, waveform),
    _entry("hubert", "audio", "HubertForCTC", "HubertConfig", WAV2VEC, waveform),
    _entry("wavlm", "audio", "WavLMForCTC", "WavLMConfig", WAV2VEC | {"num_buckets": 16, "max_bucket_distance": 32},
           waveform),
    _entry("sew", "audio", "SEWForCTC", "SEWConfig", WAV2VEC | {"squeeze_factor": 2}, waveform),
    _entry("wav2vec2_conformer", "audio", "Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig",
           WAV2VEC | {"conv_depthwise_kernel_size": 5, "position_embeddings_type": "relative"}, waveform),
    _entry("ast", "audio", "ASTForAudioClassification", "ASTConfig",
           VIT_LIKE | {"max_length": 32, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8, "num_labels": 5},
           lambda: {"input_values": torch.randn(2, 32, 32)}),
    _entry("speech_to_text", "audio", "Speech2TextForConditionalGeneration", "Speech2TextConfig", SEQ2SEQ | {
        "input_feat_per_channel": 20, "conv_channels": 40, "max_source_positions": 64, "max_target_positions": 32},
        lambda: {"input_features": torch.randn(2, 32, 20), "decoder_input_ids": ids(5)}),
]  # fmt: skip

MULTIMODAL = [
    Entry("hf:clip", "transformers multimodal", _clip_like("CLIP")),
    Entry("hf:siglip", "transformers multimodal", _clip_like("Siglip")),
    Entry("hf:chinese_clip", "transformers multimodal", _clip_like("ChineseCLIP")),
    _entry("blip", "multimodal", "BlipForConditionalGeneration", "BlipConfig", {
        "text_config": BERT_LIKE | {"encoder_hidden_size": 56, "bos_token_id": 0, "sep_token_id": 1, "eos_token_id": 1,
                                    "pad_token_id": 2},
        "vision_config": VIT_LIKE | {"hidden_size": 56, "num_attention_heads": 7}, "projection_dim": 40,
    }, image_and_text),
    _entry("vilt", "multimodal", "ViltModel", "ViltConfig", BERT_LIKE | VIT_LIKE | {"max_image_length": -1},
           image_and_text),
    _entry("llava", "multimodal", "LlavaForConditionalGeneration", "LlavaConfig", {
        "text_config": LLAMA_LIKE | {"model_type": "llama", "vocab_size": 61},
        "vision_config": VIT_LIKE | {"model_type": "clip_vision_model", "hidden_size": 56, "num_attention_heads": 7,
                                     "projection_dim": 40},
        "image_token_index": 60, "image_token_id": 60,
    }, lambda: {"input_ids": torch.cat([torch.full((2, 16), 60), ids(4)], 1)} | image()),
]  # fmt: skip

STATE_SPACE = [
    _decoder("mamba", "Mamba", {
        "vocab_size": 60, "hidden_size": 48, "state_size": 6, "num_hidden_layers": 3, "expand": 2, "conv_kernel": 4,
        "time_step_rank": 5} | IDS, "state space"),
    _decoder("mamba2", "Mamba2", {
        "vocab_size": 60, "hidden_size": 48, "state_size": 10, "num_hidden_layers": 3, "expand": 2, "conv_kernel": 4,
        "num_heads": 12, "head_dim": 8, "n_groups": 2, "chunk_size": 4} | IDS, "state space"),
    _decoder("falcon_mamba", "FalconMamba", {
        "vocab_size": 60, "hidden_size": 48, "state_size": 6, "num_hidden_layers": 3, "expand": 2, "conv_kernel": 4,
        "time_step_rank": 5} | IDS, "state space"),
    _decoder("rwkv", "Rwkv", {
        "vocab_size": 60, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 3, "context_length": 32} | IDS, "recurrent"),
    _decoder("recurrent_gemma", "RecurrentGemma", LLAMA_LIKE | {
        "lru_width": 48, "num_key_value_heads": 1, "attention_window_size": 8,
        "block_types": ["recurrent", "recurrent", "attention"]}, "recurrent"),
]  # fmt: skip

ENTRIES: list[Entry] = [
    *DECODERS, *MIXTURES, *ENCODERS, *ENCODER_DECODERS, *VISION, *AUDIO, *MULTIMODAL, *STATE_SPACE,
]  # fmt: skip
