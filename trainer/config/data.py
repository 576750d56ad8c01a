"""The data section of a recipe, and what all sections share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# of both kinds of data
AugmentLaw = Annotated[
    Literal["none", "trivial", "rand"],
    Field(description="training images: TrivialAugment (wide), or RandAugment, by torchvision's laws"),
]
RandOps = Annotated[int, Field(ge=1, le=8, description="of augment: rand, operations for each image")]
RandMagnitude = Annotated[int, Field(ge=0, le=30, description="of augment: rand, their strength")]


def _check_rand(data: ArrayData | ImageNetData) -> None:
    defaults = {name: type(data).model_fields[name].default for name in ("rand_ops", "rand_magnitude")}
    given = [name for name, default in defaults.items() if getattr(data, name) != default]
    if given and data.augment != "rand":
        raise ValueError(
            f"{', '.join(given)} are RandAugment's, and augment is {data.augment}: use data.augment=rand, or "
            "leave them out"
        )


class ArrayData(Section):
    """A data set of small images that lies in memory."""

    name: Literal["fashion_mnist", "mnist", "cifar10", "cifar100"] = Field(description="the data set")
    root: str | None = Field(
        default=None, description="its folder; else where `acdc prepare` put it, else the bundled"
    )
    batch_size: int = Field(ge=1, description="images per optimizer step, over all devices")
    eval_batch_size: int = Field(default=500, ge=1, description="images per evaluation step and device")
    crop_padding: int = Field(
        default=0, ge=0, description="pixels of zero padding to take the random crop from"
    )
    flip: bool = Field(default=False, description="mirror half of the training images")
    augment: AugmentLaw = "none"
    rand_ops: RandOps = 2
    rand_magnitude: RandMagnitude = 9
    num_threads: int = Field(default=1, ge=1, description="threads of the data pipeline per device")
    random_labels: int = Field(default=0, ge=0, description="training images that get a random label")

    @model_validator(mode="after")
    def _fits_together(self) -> ArrayData:
        if self.random_labels and (self.flip or self.crop_padding or self.augment != "none"):
            raise ValueError(
                "random_labels go without augmentation: flip: false, crop_padding: 0, augment: none"
            )
        _check_rand(self)
        return self


class ImageNetData(Section):
    """ImageNet, or any data set of image files in its layout (see data.images.files)."""

    name: Literal["imagenet", "imagefolder"] = Field(
        description="the data set; imagefolder: one of your own, in the folder root"
    )
    root: str | None = Field(
        default=None, description="the folder with train and val; else $ACDC_DATA/imagenet"
    )
    val_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="where there is no val folder: the share of each class that is split off for it",
    )
    val_seed: int = Field(default=0, ge=0, description="which images val_share takes")
    batch_size: int = Field(ge=1, description="images per optimizer step, over all devices")
    eval_batch_size: int = Field(default=250, ge=1, description="images per evaluation step and device")
    image_size: int = Field(default=224, ge=8, description="side of the training images, in pixels")
    image_sizes: list[list[int]] = Field(
        default=[], description="progressive resizing: [epoch, side] pairs, from when on which side"
    )
    min_area: float = Field(default=0.08, gt=0, le=1, description="least share of an image that a crop takes")
    flip: bool = Field(default=True, description="mirror half of the training images")
    augment: AugmentLaw = "none"
    rand_ops: RandOps = 2
    rand_magnitude: RandMagnitude = 9
    eval_resize: int = Field(default=256, ge=8, description="evaluation: shorter side after resizing")
    eval_size: int = Field(default=224, ge=8, description="evaluation: side of the crop from the centre")
    mean: list[float] | None = Field(
        default=None,
        description="of red, green, blue, scaled to 0 .. 1; default: what the weights want, else ImageNet's",
    )
    std: list[float] | None = Field(default=None, description="their standard deviation, given with mean")
    val_labels: str | None = Field(default=None, description="label file of a flat val folder")
    format: Literal["folders", "webdataset", "tfrecord", "recordio"] = Field(
        default="folders", description="how images lie on the disk; see data.images, files and records"
    )
    num_classes: int | None = Field(
        default=None, ge=1, description="of packed files that do not tell; default: 1000"
    )
    first_label: int = Field(default=0, ge=0, description="number of class 0 in packed files: 1 in some")
    backend: Literal["dali", "torch", "synthetic"] = Field(
        default="dali", description="torch: Pillow and a DataLoader; synthetic: noise on the device, no files"
    )
    device: Literal["auto", "cpu", "gpu"] = Field(default="auto", description="where DALI decodes images")
    num_threads: int | None = Field(
        default=None, ge=1, description="threads or processes of the data pipeline per device"
    )
    decoder_engine_load: float = Field(
        default=1.0, ge=0, le=1, description="share of JPEGs for the GPU's decoder engines, if it has some"
    )
    decoder_width_hint: int = Field(
        default=0, ge=0, le=65535, description="widest image to allocate engines' memory for at the start"
    )
    decoder_height_hint: int = Field(
        default=0, ge=0, le=65535, description="and the tallest, in pixels; 0: memory grows as images come"
    )
    on_error: Literal["stop", "skip"] = Field(
        default="stop", description="a file that cannot be decoded ends the run, or another stands in for it"
    )

    @field_validator("image_sizes")
    @classmethod
    def _rise(cls, pairs: list[list[int]]) -> list[list[int]]:
        epochs = [pair[0] for pair in pairs if len(pair) == 2 and pair[0] >= 0 and pair[1] >= 8]
        if len(epochs) != len(pairs) or epochs != sorted(set(epochs)) or (epochs and epochs[0] != 0):
            raise ValueError(
                f"{pairs} is not a list of [epoch, side] pairs with rising epochs, the first of them 0"
            )
        return pairs

    @model_validator(mode="after")
    def _fits_together(self) -> ImageNetData:
        if self.name == "imagefolder" and self.root is None and self.backend != "synthetic":
            raise ValueError(
                "name the folder of your images, data.root=FOLDER: FOLDER/CLASS/*.jpg, or "
                "FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg"
            )
        if self.val_share is not None and self.format != "folders":
            raise ValueError(
                f"val_share splits folders of images, not packed files of format {self.format}; leave it "
                "out, data.val_share=null"
            )
        _check_rand(self)
        given = [values for values in (self.mean, self.std) if values is not None]
        if len(given) == 1 or any(len(values) != 3 for values in given) or min(self.std or [1]) <= 0:
            raise ValueError(
                f"mean {self.mean} and std {self.std} are three numbers each, std above 0: "
                "give both, or neither"
            )
        if (self.decoder_width_hint == 0) != (self.decoder_height_hint == 0):
            raise ValueError(
                f"decoder_width_hint {self.decoder_width_hint} and decoder_height_hint "
                f"{self.decoder_height_hint} go together: give both, or neither"
            )
        if self.format != "folders" and self.backend == "torch":
            raise ValueError(f"format {self.format} is read by DALI alone; the torch backend reads folders")
        if self.format == "folders" and (self.num_classes is not None or self.first_label):
            raise ValueError("num_classes and first_label are for packed files; folders tell their classes")
        if self.eval_size > self.eval_resize:
            raise ValueError(
                f"eval_size {self.eval_size} cannot be cropped from images resized to eval_resize "
                f"{self.eval_resize}"
            )
        return self

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(epoch, side) pairs, see data.crops.CropStream."""
        return tuple((epoch, side) for epoch, side in self.image_sizes) or ((0, self.image_size),)


DataConfig = Annotated[ArrayData | ImageNetData, Field(discriminator="name")]
