"""Where the ranks that a test starts meet."""

from torch.distributed import TCPStore


def meeting_place() -> tuple[TCPStore, dict[str, str]]:
    """A store on a port of its own, and the environment that leads ranks to it, as torchrun holds one for its ranks.

    A port that was free a moment ago may be another process's when rank 0 arrives; this one is held from the start, for as
    long as the store is kept.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "GLOO_SOCKET_IFNAME": "lo"}
    return store, place | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
