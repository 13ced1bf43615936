"""HTML pages out of templates, each one file that holds whatever it needs."""

from collections.abc import Sequence
from typing import Any


def render(template: str, context: dict[str, Any], packages: Sequence[str] = ()) -> str:
    """A page.

    Args:
        template: Its file; `base.html` and the style sheet that it extends are cl_ray.report's.
        context: What the template names; a name that is not there is an error.
        packages: Other packages that have a folder `templates`.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(package) for package in ("cl_ray.report", *packages)]
        ),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(context)
