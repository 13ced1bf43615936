"""URIs whose secrets are refused, and never shown or stored.

What is safe is listed, and the rest is taken for secret: scheme, host, port, path and the options
below are public; a user, a password, any other option and a fragment are not. A URI that the
grammar here does not read is not shown at all, because another program may find a password where
this one finds a path (`user:pa/ss@host`).
"""

import re
from dataclasses import dataclass
from urllib.parse import unquote, unquote_plus

_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[\w.-]*)(?::\d{1,5})?"
_URI = re.compile(
    rf"(?P<scheme>[A-Za-z][\w+.-]*)://(?:(?P<user>[^/?#]*)@)?(?P<host>{_HOST})"
    r"(?P<path>/[^?#\x00-\x1f]*)?(?:\?(?P<query>[^#]*))?(?:#(?P<fragment>.*))?",
    re.DOTALL,
)
_URI_IN_TEXT = re.compile(r"[A-Za-z][\w+.-]{0,30}://(?:\S*@)?[^\s\"'`<>|]*")
_PUNCTUATION = ".,;:!?)]}"
"""What may follow a URI in a text and is no part of it."""
_PLAIN_VALUE = re.compile(r"(?!.*//)[\w.,:/+~{} -]*")
_HOST_VALUE = re.compile(rf"(?:https?://)?{_HOST}/?")
_HOST_OPTIONS = ("endpoint_override", "blob_storage_authority", "dfs_storage_authority")
_MARK = "***"
"""What stands for a secret."""
_USER, _OPTION, _FRAGMENT = "a user or password", "an option", "a fragment"


@dataclass(frozen=True)
class _Scheme:
    """What is known of the URIs of a scheme, or of an SQLAlchemy dialect.

    Args:
        options: Names of the options that are public.
        credentials: Where credentials belong; empty if there are none, None if the URI is the only
            place.
        drivers: The drivers of a dialect for which that is so.
    """

    options: str = ""
    credentials: str | None = ""
    drivers: tuple[str, ...] = ("",)


_S3 = _Scheme(
    "region scheme endpoint_override allow_bucket_creation allow_bucket_deletion "
    "allow_delayed_open background_writes check_directory_existence_before_creation "
    "force_virtual_addressing smart_defaults tls_ca_file_path tls_ca_dir_path "
    "tls_verify_certificates",
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or in ~/.aws/credentials",
)
_GCS = _Scheme(
    "scheme endpoint_override default_bucket_location project_id retry_limit_seconds",
    "the key file that GOOGLE_APPLICATION_CREDENTIALS names",
)
_AZURE = _Scheme(
    "blob_storage_authority dfs_storage_authority blob_storage_scheme dfs_storage_scheme "
    "credential_kind tenant_id client_id enable_tls background_writes",
    "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
)
_HADOOP = _Scheme(
    "replication buffer_size default_block_size kerb_ticket",
    "HADOOP_USER_NAME, or in a Kerberos ticket",
)
_MYSQL = _Scheme(
    "charset read_default_file read_default_group unix_socket ssl_ca ssl_cert ssl_key",
    "an option file, which ?read_default_file=/path/to/my.cnf names",
    ("", "mysqldb", "pymysql"),
)
_SCHEMES = {
    "s3": _S3,
    "gs": _GCS,
    "gcs": _GCS,
    "abfs": _AZURE,
    "abfss": _AZURE,
    "hdfs": _HADOOP,
    "viewfs": _HADOOP,
    "hf": _Scheme("", "HF_TOKEN"),
    "file": _Scheme(),
    "sqlite": _Scheme("timeout mode cache uri nolock immutable check_same_thread"),
    "postgresql": _Scheme(
        "host port sslmode sslrootcert sslcert sslkey passfile service application_name "
        "connect_timeout",
        "PGUSER and PGPASSWORD, or in PGUSER and ~/.pgpass (PGPASSFILE)",
        ("", "psycopg", "psycopg2"),
    ),
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
    "mssql": _Scheme("driver Encrypt TrustServerCertificate", None),
}
_UNKNOWN = _Scheme(credentials=None)
_ONE_SLASH = re.compile(r"(?:s3|gs|gcs|abfss?|hdfs|viewfs|hf|file):(?=\S)", re.IGNORECASE)
"""The start of a misspelt URI, which would be taken for a local path."""

_secrets: set[str] = set()


@dataclass(frozen=True)
class _Parts:
    """A URI without what may be secret, and that, each part after its kind."""

    scheme: _Scheme
    driver: str
    public: str
    hidden: list[tuple[str, str]]


def uri_problem(location: str, is_database: bool = False) -> str | None:
    """Return why a path or a URI is refused: it holds what may be secret, or cannot be read.

    Args:
        location: A local path, or a URI.
        is_database: Whether it is the URL of a database, which may hold a user and a password if
            its driver reads them nowhere else.

    Returns:
        The rest of a sentence that begins with the name of a flag or a field, without any part of
        the URI; None if it is not refused.
    """
    if "://" not in location:
        if is_database:
            return "is not a URL, such as sqlite:///s.db"
        misspelt = _ONE_SLASH.match(location)
        return f"needs two slashes after {misspelt[0].lower()}" if misspelt else None
    parts = _split(location)
    if parts is None:
        return (
            "is not shown, as it cannot be read as a URI with certainty: percent-encode special "
            "characters in its parts (%40 for @, %2F for /)"
        )
    scheme = parts.scheme
    needed = scheme.credentials is None or parts.driver not in scheme.drivers
    if not parts.hidden or (is_database and needed):
        return None
    found = " and ".join(dict(parts.hidden))
    if scheme.options:
        found = found.replace(_OPTION, f"{_OPTION} beside {', '.join(scheme.options.split())}")
    hint = f"; credentials belong in {scheme.credentials}" if scheme.credentials else ""
    return f"has {found}, which may be secret: leave it out{hint}"


def public_uri(location: str) -> str:
    """Return a path as it is, and a URI without what may be secret."""
    if "://" not in location:
        return location
    if parts := _split(location):
        return parts.public
    scheme = re.match(r"[A-Za-z][\w+.-]*://", location)
    return f"{scheme[0] if scheme else ''}{_MARK}"


def remember_secrets(location: str) -> None:
    """Have `redact` replace what may be secret in a URI from now on, wherever it occurs."""
    parts = _split(location) if "://" in location else None
    for kind, text in parts.hidden if parts else ():
        # The user of a password is no secret, and may be any word.
        values = [text, *text.split("=" if kind == _OPTION else ":", 1)[1:]]
        _secrets.update(v for value in values for v in (value, unquote(value)) if v)


def redact(text: str) -> str:
    """Return a text with the public form of the URIs in it, and without remembered secrets."""
    for secret in sorted(_secrets, key=len, reverse=True):
        pattern = re.escape(secret)
        # A short one may be part of any word.
        text = re.sub(pattern if len(secret) > 5 else rf"(?<!\w){pattern}(?!\w)", _MARK, text)
    return _URI_IN_TEXT.sub(_redact_match, text)


def _redact_match(match: re.Match[str]) -> str:
    uri = match[0].rstrip(_PUNCTUATION)
    rest = match[0][len(uri) :]
    return match[0] if uri.endswith("://") else public_uri(uri) + rest


def _split(uri: str) -> _Parts | None:
    """Divide a URI; None if the grammar does not read it."""
    found = _URI.fullmatch(uri)
    if found is None:
        return None
    dialect, _, driver = found["scheme"].lower().removeprefix("fsspec+").partition("+")
    path, user, fragment = found["path"] or "", found["user"], found["fragment"]
    if "@" in path and dialect != "hf":  # hf://datasets/owner/name@revision
        return None
    scheme, hidden = _SCHEMES.get(dialect, _UNKNOWN), []
    public = f"{found['scheme']}://"
    if user is not None and _is_public_user(dialect, user):
        public += f"{user}@"
    elif user is not None:
        hidden.append((_USER, user))
    public += found["host"] + path
    options = (found["query"] or "").split("&")
    shown = [option for option in options if not option or _is_public_option(scheme, option)]
    hidden += [(_OPTION, option) for option in options if option not in shown]
    if found["query"] is not None and shown:
        public += f"?{'&'.join(shown)}"
    if fragment is not None:
        hidden.append((_FRAGMENT, fragment))
    return _Parts(scheme, driver, public, hidden)


def _is_public_user(dialect: str, user: str) -> bool:
    """Whether a user is no secret: Azure's is a container or an account, and has no password."""
    if dialect in ("abfs", "abfss"):
        return bool(re.fullmatch(r"[a-z0-9$-]{1,63}", user))
    return dialect in ("gs", "gcs") and user == "anonymous"


def _is_public_option(scheme: _Scheme, option: str) -> bool:
    name, _, value = option.partition("=")
    pattern = _HOST_VALUE if name in _HOST_OPTIONS else _PLAIN_VALUE
    return name in scheme.options.split() and bool(pattern.fullmatch(unquote_plus(value)))
