"""Push an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.core.errors import UserError


def check_hub(name: str) -> None:
    """Refuse a hub name or login that cannot work, before anything is loaded.

    Raises:
        UserError: The name is not of the form `user/model`, nobody is logged in, or the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {name}: not a hub name: {error}") from None
    with _hub_faults(name):
        huggingface_hub.HfApi().whoami()


def push(folder: str | Path, name: str, private: bool = False) -> str:
    """Upload an exported folder to the hub; returns its address.

    Raises:
        UserError: It failed; the folder stays as it is.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with _hub_faults(name):
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export from rlhf-rankings")
    return str(address)


@contextmanager
def _hub_faults(name: str) -> Iterator[None]:
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError(f"--push-to-hub {name}: not logged in", remedy="Log in with `hf auth login`.") from None
    except (HTTPError, OSError) as error:
        why = str(error).split("\n")[0]
        raise UserError(f"--push-to-hub {name}: the hub refused or cannot be reached", why) from None
