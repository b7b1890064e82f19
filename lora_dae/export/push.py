"""Upload to the hub, or say what would be uploaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from rich.console import Console

from lora_dae.config import ConfigError


def push_folder(
    folder: Path, repo_id: str, console: Console, private: bool = True, only: Sequence[Path] | None = None
) -> bool:
    """Upload ``folder`` as the model repository ``repo_id``; True if it was uploaded.

    ``only``: these files and folders in it, and nothing else. Without a token it lists what would be uploaded. Raises
    ConfigError if the hub refuses or cannot be reached, and, before anything is uploaded, where the repository is there
    already and public though ``private`` is asked for.
    """
    chosen = [folder] if only is None else only
    inside = {file for path in chosen for file in (path, *path.rglob("*"))}
    files = sorted(file for file in inside if file.is_file())
    asked = "private" if private else "public"
    if get_token() is None:
        console.print(
            f"no hub token is set: with one, these {len(files)} files would go to {repo_id}, {asked} if it is new",
            soft_wrap=True,
            highlight=False,
        )
        for file in files:
            console.print(f"{file.stat().st_size / 1e6:9.2f} MB  {file.relative_to(folder)}", highlight=False)
        return False
    try:
        api = HfApi()
        api.create_repo(repo_id, repo_type="model", exist_ok=True, private=private)
        is_private = bool(api.model_info(repo_id).private)  # one that was there keeps what it was
        if private and not is_private:
            raise ConfigError(
                f"push={repo_id} is there already, and public: make it private on its page, or give private=false."
            )
        parts = sorted({file.relative_to(folder).parts[0] for file in files})
        size = sum(file.stat().st_size for file in files) / 1e6
        console.print(
            f"uploading to {repo_id}, which is {'private' if is_private else 'public'}: {', '.join(parts)} "
            f"({size:.2f} MB)",
            soft_wrap=True,
            highlight=False,
        )
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type="model",
            commit_message="LoRA-DAE adapter",
            allow_patterns=[file.relative_to(folder).as_posix() for file in files],
        )
    except ConfigError:
        raise
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"push={repo_id} did not work ({reason}); {folder} holds everything that was to go."
        ) from error
    console.print(f"pushed to {repo_id}", highlight=False)
    return True
