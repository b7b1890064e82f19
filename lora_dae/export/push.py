"""Upload to the hub, or say what would be uploaded."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from rich.console import Console

from lora_dae.config import ConfigError


def push_folder(folder: Path, repo_id: str, console: Console) -> bool:
    """Upload ``folder`` as the model repository ``repo_id``; True if it was uploaded.

    Without a token it lists what would be. Raises ConfigError if the hub refuses or cannot be reached.
    """
    if get_token() is None:
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        console.print(f"no hub token is set: with one, these {len(files)} files would go to {repo_id}", highlight=False)
        for file in files:
            console.print(f"{file.stat().st_size / 1e6:9.2f} MB  {file.relative_to(folder)}", highlight=False)
        return False
    try:
        api = HfApi()
        api.create_repo(repo_id, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type="model", commit_message="LoRA-DAE adapter")
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"push={repo_id} did not work ({reason}); {folder} holds everything that was to go."
        ) from error
    console.print(f"pushed to {repo_id}", highlight=False)
    return True
