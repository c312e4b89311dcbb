"""``push``: a model folder becomes a repository on the Hugging Face hub."""

from __future__ import annotations

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from weaver.artifacts.manifest import MANIFEST, REQUEST
from weaver.errors import WeaverError
from weaver.models.locate import local_path
from weaver.stages.generate import model_folder

# What the stage that made the folder left for weaver alone.
OWN_FILES = [REQUEST, MANIFEST]


def push(source: str, repository: str, *, private: bool = False) -> str:
    """Upload a model with its tokenizer and card; a repository that is missing is made.

    Args:
        source: a run directory, whose fine-tuned model goes before the assembled one, or a folder.
        repository: OWNER/NAME.
        private: of a repository that is made.

    Returns:
        Address of the upload.

    Raises:
        WeaverError: there is no such model, nobody is logged in, or the hub refuses.
    """
    if not local_path(source).is_dir():
        raise WeaverError(
            f"{source}: no such folder",
            why="what is uploaded lies here: a run directory, a model or an export",
            fix="name such a folder",
        )
    folder = model_folder(source)
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=OWN_FILES,
            commit_message="Converted by weaver",
        )
    except LocalTokenNotFoundError as error:
        raise WeaverError(
            f"{repository}: nobody is logged in at the hub",
            why="uploads need a token with the right to write",
            fix="hf auth login, or set HF_TOKEN",
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise WeaverError(
            f"{repository}: the hub did not take {folder}",
            why=" ".join(str(error).split()) or type(error).__name__,
            fix="check the name, the token's rights and the network, then push again",
        ) from error
    return str(done.commit_url)
