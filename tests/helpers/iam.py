"""What IAM would answer, by the rules of policies that cluster/ uses; moto does not ask them."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

Document = Mapping[str, Any]


def allows(document: Document, action: str, resource: str, **context: str) -> bool:
    """Return whether a policy allows an action on a resource.

    Args:
        document: The policy.
        action: As `ec2:RunInstances`.
        resource: Its ARN.
        context: Condition keys of the request; `__` stands for the colon, `_` for other signs.
    """
    known = {_plain(key): value for key, value in context.items()}
    effects = {
        statement["Effect"]
        for statement in document["Statement"]
        if _matches(action.lower(), [a.lower() for a in _listed(statement["Action"])])
        and _matches(resource, _listed(statement["Resource"]))
        and _conditions_hold(statement.get("Condition", {}), known)
    }
    return effects == {"Allow"}


def denies(document: Document, action: str, resource: str, **context: str) -> bool:
    """Return whether a policy denies it, whatever others allow."""
    statements = [s | {"Effect": "Allow"} for s in document["Statement"] if s["Effect"] == "Deny"]
    return allows({"Statement": statements}, action, resource, **context)


def _conditions_hold(conditions: Mapping[str, Any], context: Mapping[str, str]) -> bool:
    for operator, tests in conditions.items():
        assert operator in ("StringEquals", "ArnEquals", "Bool"), operator
        for key, wanted in tests.items():
            value = context.get(_plain(key))
            if value is None or not _matches(value, _listed(wanted), operator == "ArnEquals"):
                return False
    return True


def _matches(value: str, patterns: list[str], wildcards: bool = True) -> bool:
    return any(fnmatchcase(value, p) if wildcards else value == p for p in patterns)


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _plain(key: str) -> str:
    """`aws:RequestTag/ray-cluster-name` as an argument's name."""
    return key.replace(":", "__").replace("/", "_").replace("-", "_")
