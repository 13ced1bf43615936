"""The settings of `cl-ray data`: a source, its conversion, and where it is written to."""

from typing import Literal

from PIL import ImageColor
from pydantic import Field, field_validator, model_validator

from cl_ray.base_config import BaseConfig
from cl_ray.data.dataset import STACKED, STACKED_COUNTS
from cl_ray.data.decoding import (
    JPEG_QUALITY,
    MAX_PIXELS,
    MAX_SIDE,
    MIN_SIDE,
    Encoding,
    ImageLimits,
)
from cl_ray.data.splits import SPLIT_NAMES, SplitChoice
from cl_ray.data.writer import MIN_HELD_OUT, RAW_SIDE, SKIPPED_FILE, VALIDATION_FRACTION

ChannelOrder = Literal["first", "last"]
NO_LABELS = "none"
"""The value of `--label-column` that leaves the labels out."""
# fmt: off
FILE_COLUMNS = (
    "file_name", "filename", "file", "file_path", "filepath", "path", "image_path", "image_name",
    "image_file", "image", "img", "image_id", "id", "name",
)
"""Usual names of the column of file names, the likeliest first."""
LABEL_COLUMNS = (
    "label", "labels", "class", "class_name", "category", "target", "class_id", "label_id", "y",
)
# fmt: on
"""Usual names of the column of labels, the likeliest first."""


class SourceConfig(BaseConfig):
    """Convert images from any supported source to a dataset (Parquet files and dataset.json)."""

    source: str = Field(
        min_length=1,
        description="A torchvision dataset (MNIST, FashionMNIST, CIFAR10, SVHN, ...), `mnist` "
        f"(the packaged one), `{STACKED}` (three packaged digits as the channels of an image, 1000 "
        "classes), or a folder, file or URI (s3://, gs://, hf://datasets/OWNER/NAME, ...) of "
        "images, zip or tar archives of images (WebDataset too), Parquet, npz or idx. A folder of "
        "images may have a subfolder per class, and train/, validation/ and test/ on top.",
    )
    splits: SplitChoice = Field(
        "auto",
        description=f"auto: top folders or files named as splits ({', '.join(SPLIT_NAMES)}) are "
        "splits. none: such folders are classes like others, and all images are for training.",
    )
    out: str = Field(min_length=1, description="Folder or URI that the dataset is written to.")
    size: int | None = Field(
        None,
        ge=MIN_SIDE,
        le=MAX_SIDE,
        description="Scale each image's shorter side to this many pixels and crop the center "
        f"square. Without it, images that are not one square size of {MIN_SIDE} to {MAX_SIDE} are "
        "refused.",
    )
    encoding: Encoding | None = Field(
        None,
        description="How images are stored: raw pixels, or files of a format. png and webp are "
        "lossless (webp is smaller and faster); jpeg is not, and takes a third of the bytes. None "
        f"is raw up to {RAW_SIDE} pixels and png above.",
    )
    quality: int | None = Field(
        None, ge=1, le=100, description=f"Of --encoding jpeg; by default {JPEG_QUALITY}."
    )
    color: Literal["keep", "grey", "rgb"] = Field(
        "keep", description="Convert to grey or rgb; `keep` refuses a mixture of the two."
    )
    background: str | None = Field(
        None,
        description="Color to lay transparent images on, such as white or #rrggbb. Without it, "
        "they are refused.",
    )
    scale_depth: bool = Field(
        False,
        description="Map grey images of more than 8 bits to 8: the smallest value of all images "
        "to 0, the largest to 255. Without it, they are refused.",
    )
    skip_broken: bool = Field(
        False,
        description=f"Leave out images that cannot be read, and list them in {SKIPPED_FILE} "
        "beside the data. Without it, they are refused.",
    )
    max_pixels: int = Field(
        MAX_PIXELS,
        ge=1,
        description="Refuse images with more pixels, before they are decoded. The largest takes "
        "up to 20 bytes of memory a pixel.",
    )
    root: str = Field("data", description="Folder of torchvision's downloads.")
    validation_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Fraction of the training images to hold out, stratified by class, as the "
        "validation split, which checkpoints and settings are selected on. None is "
        f"{VALIDATION_FRACTION:g}, if the source has no such split and at least "
        f"{MIN_HELD_OUT / VALIDATION_FRACTION:.0f} images.",
    )
    test_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The same for the split test, which only `cl-ray evaluate` measures on.",
    )
    count: int | None = Field(
        None,
        ge=1,
        description=f"Training images of {STACKED}; by default {STACKED_COUNTS['train']:,}.",
    )
    test_count: int | None = Field(
        None,
        ge=1,
        description=f"Test images of {STACKED}, and as many validation images; by default "
        f"{STACKED_COUNTS['test']:,}.",
    )
    image_column: str | None = Field(
        None,
        description="Parquet column of the images: pixels (whole numbers from 0 to 255, floats "
        "from 0 to 1 or from -1 to 1), encoded image files, or paths of image files. Of an npz "
        "file, the name of the array of images.",
    )
    channels: ChannelOrder | None = Field(
        None,
        description="Order of colour pixels that Parquet holds as flat lists: first is all of "
        "red, then green, then blue; last is red, green and blue of each pixel. Without it, they "
        "are refused.",
    )
    label_column: str | None = Field(
        None,
        description="Column of the classes, in Parquet (by default `label`, if there is one) or "
        f"in a table beside image files (one of {', '.join(LABEL_COLUMNS)}). `none` leaves the "
        "labels of any source out. Of an npz file, the name of the array of labels.",
    )
    file_column: str | None = Field(
        None,
        description="Column of the names of image files in a table beside them (labels.csv, "
        f"metadata.jsonl, ...); by default one of {', '.join(FILE_COLUMNS)}.",
    )
    unlabelled: Literal["keep", "drop"] = Field(
        "keep",
        description="Whether to keep images without a label where others have one. Condition "
        "projection needs a label for every training image; condition classifier does not.",
    )
    licence: str | None = Field(None, description="Terms of use, recorded with the data.")
    seed: int = Field(
        0,
        ge=0,
        description="Determines the order of the rows, which are held out and which digits are "
        "stacked.",
    )
    overwrite: bool = Field(False, description="Replace the dataset that is at `out`.")

    @property
    def limits(self) -> ImageLimits:
        """Which images are refused, and what they are scaled to."""
        return ImageLimits(self.max_pixels, None if self.size else MAX_SIDE, self.size)

    @model_validator(mode="after")
    def _check_quality(self) -> "SourceConfig":
        if self.quality is not None and self.encoding != "jpeg":
            raise ValueError(
                f"quality {self.quality} is of JPEG only: add `--encoding jpeg` or leave it out"
            )
        return self

    @field_validator("background")
    @classmethod
    def _check_background(cls, background: str | None) -> str | None:
        try:
            ImageColor.getrgb(background or "white")
        except ValueError as error:
            raise ValueError(
                f"background {background!r} is refused: give a color's name, such as white, or "
                "#rrggbb"
            ) from error
        return background
