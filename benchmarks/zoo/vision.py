"""Vision models, and what is neither vision nor language: one small member of every file of timm, torchvision, and others.

Inputs are as small as the code allows.  The sizes and names below were found by building and running every candidate;
`tests/test_zoo.py` says when timm has a file that is not in the table.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmscale.optional import require
from dmscale.sources import allow_missing_torchvision_operators

from . import handwritten
from .entry import Entry

Built = tuple[nn.Module, Any]

# -- timm -------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"embed_dim": 192, "depth": 3, "num_heads": 3}
"""A transformer whose smallest published size is large, built small."""

TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 64, {"img_size": 64, **SMALL}),
    "byoanet": ("halonet_h1", 256, {"img_size": 256}),
    "byobnet": ("mobileone_s1", 64, {"img_size": 64}),
    "cait": ("cait_xxs24_224", 64, {"img_size": 64}),
    "coat": ("coat_tiny", 64, {"img_size": 64}),
    "convit": ("convit_tiny", 64, {"img_size": 64}),
    "convmixer": ("convmixer_768_32", 64, {}),
    "convnext": ("convnext_zepto_rms", 64, {}),
    "cpubone": ("cpubone_nano", 64, {}),
    "crossvit": ("crossvit_tiny_240", 64, {}),
    "csatv2": ("csatv2", 64, {}),
    "cspnet": ("cs3darknet_focus_s", 64, {}),
    "cspnext": ("cspnext_tiny", 64, {}),
    "davit": ("davit_tiny", 64, {}),
    "deepseek_vit": ("deepseek_vit_412m", 84, {"num_classes": 100, "img_size": 84, **SMALL}),
    "deit": ("deit_tiny_patch16_224", 64, {"img_size": 64}),
    "densenet": ("densenet121", 64, {}),
    "dla": ("dla46x_c", 64, {}),
    "dpn": ("dpn48b", 64, {}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {"img_size": 224}),
    "efficientformer_v2": ("efficientformerv2_s0", 64, {"img_size": 64}),
    "efficientnet": ("mobilenetv2_035", 64, {}),
    "efficientvim": ("efficientvim_m1", 64, {}),
    "efficientvit_mit": ("efficientvit_b0", 64, {}),
    "efficientvit_msra": ("efficientvit_m0", 64, {"img_size": 64}),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 64, {"num_classes": 100, "img_size": 64}),
    "fasternet": ("fasternet_t0", 64, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "focalnet": ("focalnet_tiny_srf", 64, {}),
    "gcvit": ("gcvit_xxtiny", 64, {"img_size": 64}),
    "gemma4_vit": ("gemma4_vit_167m", 64, {"num_classes": 100, "img_size": 64, **SMALL}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "hardcorenas": ("hardcorenas_b", 64, {}),
    "hgnet": ("hgnetv2_b0", 64, {}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": 64}),
    "hieradet_sam2": ("sam2_hiera_tiny", 64, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "iformer": ("iformer_t", 64, {}),
    "inception_next": ("inception_next_atto", 64, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 96, {}),
    "inception_v3": ("inception_v3", 96, {}),
    "inception_v4": ("inception_v4", 96, {}),
    "lcnetv2": ("lcnetv2_small", 64, {}),
    "levit": ("levit_192", 64, {"img_size": 64}),
    "lowformer": ("lowformer_b0", 64, {}),
    "mambaout": ("mambaout_femto", 64, {}),
    "maxxvit": ("maxvit_pico_rw_256", 64, {"img_size": 64}),
    "metaformer": ("poolformerv2_s12", 64, {}),
    "mlp_mixer": ("gmlp_ti16_224", 64, {"img_size": 64}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "mobilenetv5": ("mobilenetv5_300m", 64, {"channel_multiplier": 0.25}),
    "mobilevit": ("mobilevit_xxs", 64, {"img_size": 64}),
    "mvitv2": ("mvitv2_tiny", 64, {"img_size": 64}),
    "naflexvit": ("naflexvit_so150m2_patch16_reg1_gap", 64, {"img_size": 64, **SMALL}),
    "nasnet": ("nasnetalarge", 64, {}),
    "nest": ("nest_tiny", 64, {"img_size": 64}),
    "nextvit": ("nextvit_small", 64, {}),
    "nfnet": ("nf_regnet_b0", 64, {}),
    "pit": ("pit_ti_224", 64, {"img_size": 64}),
    "pnasnet": ("pnasnet5large", 64, {}),
    "pvt_v2": ("pvt_v2_b0", 64, {}),
    "qwen3_vit": ("qwen3_vit_88m", 64, {"num_classes": 100, "img_size": 64, **SMALL}),
    "rdnet": ("rdnet_tiny", 64, {}),
    "regnet": ("regnetx_002", 64, {}),
    "repghost": ("repghostnet_050", 64, {}),
    "repvit": ("repvit_m1", 64, {"img_size": 64}),
    "res2net": ("res2next50", 64, {}),
    "resnest": ("resnest14d", 64, {}),
    "resnet": ("resnet10t", 64, {}),
    "resnetv2": ("resnetv2_18", 64, {}),
    "rexnet": ("rexnet_100", 64, {}),
    "selecsls": ("selecsls42", 64, {}),
    "senet": ("legacy_seresnet18", 64, {}),
    "sequencer": ("sequencer2d_s", 64, {"img_size": 64}),
    "shvit": ("shvit_s1", 64, {}),
    "sknet": ("skresnet18", 64, {}),
    "starnet": ("starnet_s050", 64, {}),
    "swiftformer": ("swiftformer_xs", 64, {"img_size": 64}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 64, {"img_size": 64}),
    "swin_transformer_v2": ("swinv2_tiny_window16_256", 64, {"img_size": 64}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 64, {"img_size": 64}),
    "tiny_vit": ("tiny_vit_5m_224", 64, {}),
    "tnt": ("tnt_s_legacy_patch16_224", 64, {"img_size": 64}),
    "tresnet": ("tresnet_m", 64, {}),
    "twins": ("twins_svt_small", 64, {"img_size": 64}),
    "vgg": ("vgg11", 64, {}),
    "visformer": ("visformer_tiny", 64, {"img_size": 64}),
    "vision_transformer": ("vit_tiny_patch16_224", 64, {"img_size": 64}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 64, {"img_size": 64}),
    "vision_transformer_relpos": ("vit_srelpos_small_patch16_224", 64, {"img_size": 64}),
    "vision_transformer_sam": ("samvit_base_patch16_224", 64, {"img_size": 64, **SMALL, "global_attn_indexes": (2,)}),
    "vitamin": ("vitamin_small_224", 64, {"img_size": 64}),
    "volo": ("volo_d1_224", 64, {"img_size": 64}),
    "vovnet": ("ese_vovnet19b_slim_dw", 64, {}),
    "xception": ("legacy_xception", 64, {}),
    "xception_aligned": ("xception41p", 64, {}),
    "xcit": ("xcit_nano_12_p8_224", 64, {"img_size": 64}),
}  # fmt: skip
"""File of timm -> (its smallest model with weights, input size in pixels, arguments).

Where even the smallest is large, its class is built with fewer or narrower blocks.
"""

MORE_TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "poolformerv2_s12": (64, {}),
    "resnet18": (64, {}),
    "resnet50": (64, {}),
    "efficientnet_b0": (64, {}),
    "mobilenetv2_050": (64, {}),
    "gmixer_12_224": (64, {"img_size": 64}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "caformer_s18": (64, {}),
    "convformer_s18": (64, {}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "mobileone_s0": (64, {"img_size": 64}),
    "vit_relpos_small_patch16_224": (64, {"img_size": 64}),
    "maxvit_nano_rw_256": (64, {"img_size": 64}),
    "coatnet_nano_rw_224": (64, {"img_size": 64}),
    "test_vit4": (64, {"img_size": 64}),
    "lambda_resnet26rpt_256": (64, {"img_size": 64}),
    "botnet26t_256": (64, {"img_size": 64}),
}  # fmt: skip
"""What people use most, and the other kinds of block that share a file."""


def _timm(name: str, size: int, options: dict[str, Any]) -> Built:
    allow_missing_torchvision_operators()
    timm = require("timm", "timm", name)
    return timm.create_model(name, pretrained=False, **options), torch.randn(2, 3, size, size)


# -- torchvision ------------------------------------------------------------------------------------------------------

CLASSIFICATION = {
    "alexnet": 64, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64,
    "googlenet": 64, "inception_v3": 96, "maxvit_t": 224, "mnasnet0_5": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64, "regnet_y_400mf": 64, "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64, "squeezenet1_0": 64, "swin_t": 64, "swin_v2_t": 64, "vgg11": 64, "vit_b_32": 64,
    "wide_resnet50_2": 64,
}  # fmt: skip
"""torchvision model -> input size in pixels."""
SIZED: dict[str, dict[str, Any]] = {
    "vit_b_32": {"image_size": 64},
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}
"""Arguments that a model needs for its size, or to be built quickly."""
SEGMENTATION = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = {"r3d_18": (8, 32), "mc3_18": (8, 32), "r2plus1d_18": (8, 32), "swin3d_t": (4, 64)}
"""torchvision model -> (frames, pixels)."""
DETECTION = (
    "retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_fpn",
)  # fmt: skip


def _models() -> Any:
    allow_missing_torchvision_operators()
    return require("torchvision", "torchvision", "the zoo").models


def _classifier(name: str, size: int) -> Built:
    model = _models().get_model(name, weights=None, **SIZED.get(name, {}))
    return model, torch.randn(2, 3, size, size)


def _segmenter(name: str) -> Built:
    return _models().get_model(name, weights=None, weights_backbone=None), torch.randn(2, 3, 64, 64)


def _video(name: str, frames: int, size: int) -> Built:
    return _models().get_model(name, weights=None), torch.randn(1, 3, frames, size, size)


class Detector(nn.Module):
    """Everything of a torchvision detector that has parameters: backbone, feature pyramid and heads.

    What lies between and behind (proposals, non-maximum suppression) has none, depends on values, and needs operators
    that not every build has.  The boxes of a two-stage detector are the whole picture, pooled from its last level.
    """

    def __init__(self, detector: Any):
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head
        roi = getattr(detector, "roi_heads", None)
        self.box_head = roi.box_head if roi is not None else None
        self.box_predictor = roi.box_predictor if roi is not None else None

    def forward(self, image: Tensor) -> Any:
        """(B, 3, H, W) -> what the heads give, as they nest it."""
        features = self.backbone(image)
        levels = list(features.values()) if hasattr(features, "values") else [features]
        out = self.head(levels)
        if self.box_head is None:
            return out
        boxes = nn.functional.adaptive_avg_pool2d(levels[-1], 7)
        return out, self.box_predictor(self.box_head(boxes))


def _detector(name: str) -> Built:
    model = _models().get_model(name, weights=None, weights_backbone=None)
    return Detector(model), torch.randn(2, 3, 128, 128)


# -- other libraries --------------------------------------------------------------------------------------------------


def _smp(name: str) -> Built:
    allow_missing_torchvision_operators()
    smp = require("segmentation_models_pytorch", "zoo", name)
    return getattr(smp, name)("resnet18", encoder_weights=None, classes=3), torch.randn(2, 3, 64, 64)


def _ultralytics(config: str) -> Built:
    allow_missing_torchvision_operators()
    os.environ.setdefault("YOLO_OFFLINE", "True")
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
    tasks = require("ultralytics.nn.tasks", "zoo", config)
    kind = tasks.RTDETRDetectionModel if config.startswith("rtdetr") else tasks.DetectionModel
    return kind(config, nc=10, verbose=False), torch.randn(1, 3, 64, 64)


def _unet2d() -> Built:
    allow_missing_torchvision_operators()
    diffusers = require("diffusers", "zoo", "UNet2DModel")
    model = diffusers.UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, (torch.randn(2, 3, 16, 16), torch.tensor([3, 7]))


def _dit() -> Built:
    allow_missing_torchvision_operators()
    diffusers = require("diffusers", "zoo", "DiTTransformer2DModel")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=16, num_embeds_ada_norm=10
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
    }
    return model, inputs


def _graph() -> Built:
    edges, graph = torch.randint(0, 20, (2, 60)), torch.arange(20) // 10
    return handwritten.GraphNet(), (torch.randn(20, 9), edges, graph)


def _video3d() -> Built:
    return handwritten.VideoNet(), torch.randn(2, 3, 4, 24, 24)


def _sound() -> Built:
    return handwritten.TemporalNet(), torch.randn(2, 1, 400)


def _mixture() -> Built:
    return handwritten.MixtureNet(), torch.randint(0, 100, (2, 20))


def _supernet() -> Built:
    return handwritten.Supernet(), torch.randn(2, 3, 16, 16)


def _recurrent(cell: type[nn.RNNBase], bidirectional: bool = False) -> Built:
    return handwritten.RecurrentNet(cell, bidirectional), torch.randint(0, 100, (2, 7))


def _entries() -> list[Entry]:
    def entry(name: str, family: str, build: Callable[..., Built], *args: Any, requires: str = "") -> Entry:
        return Entry(name, family, functools.partial(build, *args), requires)

    timm = {name: (size, options) for name, size, options in TIMM.values()} | MORE_TIMM
    return [
        *(entry(f"timm:{n}", "timm", _timm, n, *rest) for n, rest in timm.items()),
        *(entry(f"torchvision:{n}", "torchvision, classification", _classifier, n, s) for n, s in CLASSIFICATION.items()),
        *(entry(f"torchvision:{n}", "torchvision, segmentation", _segmenter, n) for n in SEGMENTATION),
        *(entry(f"torchvision:{n}", "torchvision, video", _video, n, *size) for n, size in VIDEO.items()),
        *(entry(f"torchvision:{n}", "torchvision, detection", _detector, n) for n in DETECTION),
        *(entry(f"smp:{n}", "segmentation-models-pytorch", _smp, n, requires="segmentation_models_pytorch")
          for n in ("Unet", "UnetPlusPlus", "FPN")),
        *(entry(f"ultralytics:{n}", "ultralytics", _ultralytics, f"{n}.yaml", requires="ultralytics")
          for n in ("yolov8n", "yolo11n", "rtdetr-resnet50")),
        entry("diffusers:UNet2DModel", "diffusers", _unet2d, requires="diffusers"),
        entry("diffusers:DiTTransformer2DModel", "diffusers", _dit, requires="diffusers"),
        entry("own:graph network", "written by hand", _graph),
        entry("own:Conv3d video network", "written by hand", _video3d),
        entry("own:Conv1d temporal network", "written by hand", _sound),
        entry("own:LSTM classifier", "written by hand", _recurrent, nn.LSTM),
        entry("own:LSTM classifier, bidirectional", "written by hand", _recurrent, nn.LSTM, True),
        entry("own:GRU classifier", "written by hand", _recurrent, nn.GRU),
        entry("own:mixture of experts in a list", "written by hand", _mixture),
        entry("own:DARTS supernet", "written by hand", _supernet),
    ]  # fmt: skip


ENTRIES = _entries()
