"""Where the parts of SD3-Medium lie: in the hub's cache, under the ids that DiffusionKit downloads, or in one local
folder.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import ArtifactError
from ...files.hub import hub_files

HUB = "argmaxinc/mlx-stable-diffusion-3-medium"
TEXT_HUB = "argmaxinc/stable-diffusion"
T5_HUB = "google/t5-v1_1-xxl"
CHECKPOINT = "sd3_medium.safetensors"  # transformer and VAE
PIXELS = 8  # of a picture's side, for one of a latent
T5_FOLDER = "t5"
INSTEAD = "pass a local folder with --model"


class Files:
    """The files of one copy of the model. A local folder holds ``sd3_medium.safetensors`` and the folders ``clip_l``,
    ``clip_g``, ``tokenizer_l``, ``tokenizer_g`` and ``t5`` as on the hub, and T5's config and tokenizer in ``t5``, too.
    """

    def __init__(self, place: str = ""):
        """``place``: a hub id for the checkpoint, or a folder; the text encoders of a hub id come from where
        DiffusionKit has them.
        """
        self.place = place or HUB
        self.folder = Path(place) if place and Path(place).is_dir() else None
        if self.folder is None and self.place != HUB:
            raise ArtifactError(
                f"{place}: no such folder, and not the hub id {HUB}; the model's text encoders and VAE are expected"
                " there, as they were when it was made: put them back, or a link, or set model.adapter.place"
            )

    def path(self, name: str) -> Path:
        """A file on this disk, downloaded where that is needed and allowed; raises ArtifactError, saying how to
        get it.
        """
        if self.folder is None:
            return hub_files(self.place if name == CHECKPOINT else TEXT_HUB, [name], "diffusionkit", INSTEAD)[0]
        path = self.folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; get it with '{self.command(name)}'")
        return path

    @property
    def t5(self) -> str:
        """What transformers reads T5's config and tokenizer from: a folder or a hub id."""
        if self.folder is None:
            return T5_HUB
        folder = self.folder / T5_FOLDER
        if not (folder / "config.json").is_file():
            raise ArtifactError(
                f"{folder / 'config.json'} is missing; get it and T5's tokenizer with '{self.t5_command}'"
            )
        return str(folder)

    def t5_file(self, name: str) -> Path:
        """A file of T5's config and tokenizer on this disk; raises ArtifactError, saying how to get it."""
        if self.folder is None:
            return hub_files(T5_HUB, [name], "diffusionkit", INSTEAD)[0]
        path = self.folder / T5_FOLDER / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; get it with '{self.t5_command}'")
        return path

    def command(self, name: str) -> str:
        """The command that downloads a file anew."""
        repository = HUB if name == CHECKPOINT else TEXT_HUB
        return f"hf download {repository} {name} " + (
            "--force-download" if self.folder is None else f"--local-dir {self.folder}"
        )

    @property
    def t5_command(self) -> str:
        """The command that downloads T5's config and tokenizer anew."""
        where = "--force-download" if self.folder is None else f"--local-dir {self.folder / T5_FOLDER}"
        return f"hf download {T5_HUB} config.json tokenizer_config.json special_tokens_map.json spiece.model {where}"
