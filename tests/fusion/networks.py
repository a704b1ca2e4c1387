"""Networks of other packages, tiny: how each is made, its inputs, and what of its outputs is compared."""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Network(NamedTuple):
    """``make()`` once ``package`` is there, the arguments of its forward, and the tensor of what that returns."""

    package: str
    make: Callable[[], nn.Module]
    inputs: dict[str, Any]
    #: How many operations stand behind its norms, and sums ahead of them, where ``fuse`` can see them.
    operations: int
    result: Callable[[Any], Tensor] = lambda output: output
    #: Relative.
    tolerance: float = 1e-7
    #: How many of these ``fuse`` leaves, and how many operations a captured graph shows: by default as many.
    stay: int = 0
    captured: int | None = None
    #: Whether its forwards are called in ways that ``fuse`` knows.
    is_known: bool = True


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@functools.cache
def torchvision_can_be_imported() -> None:
    """Beside another build of torch, torchvision's compiled operators are missing, and its import asks for two."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except ModuleNotFoundError:
        pass


def timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


def unet2d() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip


def unet2d_scale_shift() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
        norm_num_groups=4, attention_head_dim=4, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip


def monai_unet() -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2), num_res_units=2)


def basic_unet() -> nn.Module:
    from monai.networks.nets import BasicUNet

    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(4, 4, 8, 8, 16, 4))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    ))  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip


def vit() -> nn.Module:
    return timm(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=3, num_heads=2, num_classes=5
    )  # fmt: skip


def nnunet() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    return PlainConvUNet(
        1, 3, (4, 8, 16), nn.Conv2d, 3, (1, 2, 2), (2, 2, 2), 2, (2, 2), conv_bias=True, norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def resenc() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    return ResidualEncoderUNet(
        1, 3, (4, 8, 16), nn.Conv2d, 3, (1, 2, 2), (1, 2, 2), 2, (1, 1), conv_bias=True, norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def sample(output: Any) -> Tensor:
    return output.sample


def logits(output: Any) -> Tensor:
    return output.logits


X = {"x": image(2, 3, 64, 64)}
GREY = {"x": image(2, 1, 32, 32)}
DIFFUSION = {"sample": image(1, 3, 16, 16), "timestep": torch.tensor([7])}
LATENT = {"sample": image(1, 3, 16, 16)}
PATCHES = {
    "hidden_states": image(2, 4, 8, 8), "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2]),
}  # fmt: skip
TOKENS = {"input_ids": torch.arange(12).reshape(2, 6)}

NETWORKS = {
    "diffusers UNet2DModel": Network("diffusers", unet2d, DIFFUSION, 17, sample),
    "diffusers UNet2DModel, scale and shift": Network("diffusers", unet2d_scale_shift, DIFFUSION, 37, sample),
    "diffusers AutoencoderKL": Network("diffusers", autoencoder, LATENT, 22, sample),
    "timm resnet50": Network("timm", lambda: timm("resnet50", num_classes=5), X, 65),
    "timm efficientnet_b0": Network("timm", lambda: timm("efficientnet_b0", num_classes=5), X, 42),
    "timm convnext_tiny": Network("timm", lambda: timm("convnext_tiny", num_classes=5, dims=(4, 8, 16, 32)), X, 0),
    "MONAI UNet": Network("monai", monai_unet, GREY, 9),
    "MONAI BasicUNet": Network("monai", basic_unet, GREY, 18),
    # Sums at the ends of blocks, and their norms at the beginnings of the next: what is a forward's own is fused.
    "timm vit_tiny": Network("timm", vit, {"x": image(2, 3, 32, 32)}, 6, stay=3),
    "HF GPT-2": Network("transformers", gpt2, TOKENS, 2, logits, captured=4, is_known=False),
    # Its own norm computes in float32, whatever the input.
    "HF Llama": Network("transformers", llama, TOKENS, 2, logits, 1e-4, captured=4),
    # Whose blocks ask for what torch.fx cannot know.
    "diffusers DiT": Network("diffusers", dit, PATCHES, 4, sample, captured=14),
    "nnU-Net": Network("dynamic_network_architectures", nnunet, GREY, 10),
    "nnU-Net ResEnc": Network("dynamic_network_architectures", resenc, GREY, 18),
}
