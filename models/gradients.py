"""Weight gradients of a ResNet's small convolutions on a CPU, as one matrix product each.

oneDNN 3.12 needs most of a training step for them where images are small (0.05 s for 512 channels of 4 x 2 pixels, ten
times as long as the matrix product), and gives wrong ones in bfloat16 where they are smaller still.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

FEWEST_CHANNELS = 128  # with fewer the images are large, and oneDNN is as fast


class ProductGradient(torch.autograd.Function):
    """A convolution whose weight gradient is a matrix product of output gradients and input patches."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        images: torch.Tensor,
        weight: torch.Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        ctx.geometry = stride, padding
        return functional.conv2d(images, weight, None, stride, padding)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple:
        images, weight = ctx.saved_tensors
        stride, padding = ctx.geometry
        of_images = torch.nn.grad.conv2d_input(images.shape, weight, gradient, stride, padding)
        channels, _, height, width = weight.shape
        padded = functional.pad(images.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
        patches = padded.unfold(1, height, stride[0]).unfold(2, width, stride[1])  # (batch, rows, columns, channels, …)
        patches = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, height * width * images.shape[1])
        of_weight = gradient.permute(0, 2, 3, 1).reshape(-1, channels).T @ patches
        return of_images, of_weight.view(channels, height, width, -1).permute(0, 3, 1, 2), None, None


class Convolution(nn.Conv2d):
    """A convolution without bias, groups or dilation that takes its weight gradient by `ProductGradient`."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return ProductGradient.apply(images, self.weight, self.stride, self.padding)


def speed_up_gradients(model: nn.Module) -> None:
    """Give the small convolutions of a network that trains on a CPU the faster gradient, in place."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.in_channels >= FEWEST_CHANNELS:
            module.__class__ = Convolution
