"""Published checkpoints by name: "owner/name" or "owner/name@revision" on the Hugging Face hub, or on what HF_ENDPOINT
names.

:func:`fetch` downloads what is asked for into the hub's own cache and returns the folder. Only files at the top of a
repository are fetched, which is where the published layout keeps them, and never pickles or code. The hub's settings
(HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT) hold here as everywhere; huggingface_hub reads them when
it is imported, which is when a function here first needs it.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from abyssal.errors import UserError

_OPTIONAL = ("*.jinja", "tiktoken.model")  # no repository must have them
CONFIG = ("config.json",)
SMALL = ("*.json", *_OPTIONAL)  # config, index, generation_config, tokenizer
WEIGHTS = ("*.safetensors",)

# The hub's patterns cross folders: "*.safetensors" alone would also fetch a second copy in onnx/ or original/.
_REFUSED = ("*/*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.py")
_REVISION = re.compile(r"\w[\w.+/-]*", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form of "owner/name" or "owner/name@revision". A path "runs/demo" has it too: ask only
    where no such path exists."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo, at, revision = text.partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return "/" in repo and (not at or (_REVISION.fullmatch(revision) is not None and ".." not in revision))


def fetch(spec: str, patterns: Sequence[str], progress: bool = True) -> Path:
    """The folder in the hub's cache with the files of ``spec`` that match ``patterns``; what is missing is downloaded.

    Every pattern must match a file, whether it is a name or a glob; only "*.jinja" and "tiktoken.model" need not.
    Other files of the repository may lie in the folder as well, from other downloads. Without the hub (no network,
    HF_HUB_OFFLINE, repository gone) the same rule holds for the cache. A cache that :func:`fetch` filled knows the
    repository's list of files and so whether some that match a glob are missing; one that another program filled file
    by file (transformers does) may not, so ask for a model's shards by the names in its index. ``progress`` shows
    huggingface_hub's bars on stderr. Raises UserError where the files cannot be had, with the cause.
    """
    if not is_hub_id(spec):
        raise UserError(f"{spec!r}: not a name on the hub; expected owner/name or owner/name@revision")
    for pattern in patterns:
        if any(fnmatchcase(pattern, refused) for refused in _REFUSED):
            raise UserError(f"{spec}: {pattern!r} is not fetched: only files at the top, and no pickles or code")
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "disable": True})

    repo, _, revision = spec.partition("@")
    revision = revision or constants.DEFAULT_REVISION
    allowed, ignored = list(patterns), list(_REFUSED)
    wanted: Sequence[str] = patterns
    try:
        # snapshot_download asks the same without a timeout, which hangs for minutes behind a firewall that drops
        # packets, and where the hub does not answer it may hand out whatever the cache has. So ask first.
        info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        names = [file.rfilename for file in info.siblings or []]
        if absent := _unmatched(patterns, names):
            pickled = "; its pickled weights are not read" if any(fnmatchcase(n, "*.bin") for n in names) else ""
            raise UserError(f"{spec}: this repository has no {_few(absent)}{pickled}")
        plan = snapshot_download(
            repo,
            revision=info.sha,
            allow_patterns=allowed,
            ignore_patterns=ignored,
            tqdm_class=Silent,
            dry_run=True,
        )
        wanted = [file.filename for file in plan]
        cache = Path(constants.HF_HUB_CACHE)
        needed = sum(file.file_size or 0 for file in plan if file.will_download)
        free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
        if needed > free:
            raise UserError(
                f"{spec}: {needed / 1e9:.2f} GB more are needed in {cache} and {free / 1e9:.2f} GB are free;"
                " make room, or set HF_HOME to a folder on another disk"
            )
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=allowed,
                ignore_patterns=ignored,
                tqdm_class=None if progress else Silent,
            )
        )
        if _unmatched(wanted, _files(folder)):
            raise ConnectionError("the hub stopped answering")
    # RuntimeError is hf_xet's, for a full disk too; ImportError comes of a SOCKS proxy without the package for it.
    except (HTTPError, OSError, RuntimeError, ImportError, json.JSONDecodeError) as error:
        cached = _cached(repo, revision, wanted)
        if cached is None:
            raise UserError(f"{spec}: {_cause(error, repo, revision, wanted)}") from error
        return cached
    return folder


def _cached(repo: str, revision: str, wanted: Sequence[str]) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        # Raises where the cache has the repository's list of files and not all that match; else takes what is there.
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(_REFUSED),
                local_files_only=True,
            )
        )
    except OSError:
        return None
    return None if _unmatched(wanted, _files(folder)) else folder


def _cause(error: Exception, repo: str, revision: str, wanted: Sequence[str]) -> str:
    from huggingface_hub import constants, errors

    # Both say that something failed; what it was is their cause.
    while isinstance(error, errors.LocalEntryNotFoundError | errors.DryRunError) and isinstance(
        error.__cause__, Exception
    ):
        error = error.__cause__
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    not_cached = f"the cache {cache} does not hold {_few(wanted)}"
    detail = " ".join(str(error).split())
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        return f"gated: ask for access at {hub}/{repo}, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub}/{repo} has no branch, tag or commit {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"{hub} has no such repository, or it is private and needs a token (`hf auth login`)"
    if isinstance(error, errors.HfHubHTTPError):
        said = f" ({error.server_message})" if error.server_message else ""
        return " ".join(f"{hub} answered {status}{said}, and {not_cached}".split())
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and {not_cached}"
    if isinstance(error, json.JSONDecodeError):
        return f"what {hub} answered does not come from a hub (HF_ENDPOINT, or a proxy?), and {not_cached}"
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in detail:
        return f"no space is left in {cache}; files that came whole are kept. HF_HOME names another folder"
    if code is not None and not isinstance(error, ConnectionError):
        return f"cannot write to the cache {cache}: {detail}"
    return f"no connection to {hub}, or it broke off ({detail or type(error).__name__}), and {not_cached}"


def _unmatched(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    names = [name for name in names if "/" not in name]
    return [p for p in patterns if p not in (*_OPTIONAL, *names) and not any(fnmatchcase(name, p) for name in names)]


def _files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
