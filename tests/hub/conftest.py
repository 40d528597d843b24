import pytest
from hub_server import HubServer


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine that huggingface_hub, in this process, takes for the real one; its cache is empty."""
    from huggingface_hub import close_session, constants

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer(tmp_path / "hub") as server:
        # The variables are read when huggingface_hub is imported; these are what it made of them.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        close_session()  # a client made before keeps the proxies it saw
        yield server
    close_session()
