"""The config of evaluations while a run trains."""

from pydantic import Field

from cl_ray.base_config import BaseConfig, marks

MANIFOLD_NEIGHBOURS = 5
"""k of precision, recall, density and coverage: Naeem et al. recommend 5 (section 4.3)."""


class EvaluationConfig(BaseConfig):
    """How often a run is evaluated, and on how many images."""

    every: int = Field(
        1,
        ge=0,
        description="Evaluate every this many epochs and after the last; 0: never.",
        json_schema_extra=marks("changeable_on_resume"),
    )
    reference: str = Field(
        "auto",
        description="Reference for the features of generated images: `mnist` (packaged), "
        "`stacked-mnist` (the same on each channel, which also counts modes), the path of one that "
        "`train_reference` of Python wrote, the folder of another run (its D), "
        "`transformers:MODEL` (a folder, or a model in the cache of Hugging Face's hub, such as "
        "`facebook/dinov2-small`), `torchvision:NAME` (such as `resnet50`, in torch.hub's cache), "
        "`inception:PATH`, or none; nothing is downloaded. auto: `mnist` for the packaged digits, "
        "`stacked-mnist` for such data, for other labelled data one that is trained in a minute or "
        "two and kept beside them, else none.",
    )
    samples: int = Field(
        10_000,
        gt=MANIFOLD_NEIGHBOURS,
        description="Number of generated images; they are compared with as many real images of the "
        "validation split, or with all of them if it has fewer.",
    )
    images: int = Field(
        10_000, gt=MANIFOLD_NEIGHBOURS, description="Training images that probes are fitted to."
    )
