"""The model and the maths: torch, diffusers, pyarrow; no orchestrator, tracker or HTTP.

The words of this package and of what builds on it. Letters in shapes and in suffixes of tensors:

```
B  rows, one image each           L  image tokens     W  steps of the stochastic window
P  cases                          D  packed channels  K  noise levels of a row in the update
G  members of a group; B = P G    T  text tokens
S  sampling steps                 I  style tokens
```

A module's docstring says where a letter stands for something else, as D for a transformer's width.

```
x0         clean latent of an image, packed: [B, L, D]
sigma      noise level, 0 for the image to 1 for noise alone: x = (1 - sigma) x0 + sigma noise
velocity   what the model predicts, noise - x0; the x0 that this means is x - sigma velocity
```

A policy is a set of values for the trained weights (style adapter, LoRA) on one frozen base:

```
trained    the one that is optimised; it lies in the model
old        the one that samples: a copy of trained (GRPO), or one that follows it (DiffusionNFT)
reference  the start of the reinforcement learning; the KL term holds trained near it
ema        the moving average of trained; it is evaluated and exported
```

What is trained on:

```
case       what is to be painted: a source picture, its mask, a style reference, and the text;
           the field's words for it are prompt and sample
group      the images of one case in one round; their noise alone differs, their rewards compare
round      rollout, score, advantage, update and refresh, once; counted from 0
```
"""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("calligrapher")
except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
    __version__ = "unknown"
