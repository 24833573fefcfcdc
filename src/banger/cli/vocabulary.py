"""Words of Docker, Podman, Multipass, Lima and Vagrant, and what does here what they mean there.

Imported only when a command or an option is not known. A name that banger has is never in these tables.
"""

from __future__ import annotations

from collections.abc import Container

_NO_MOUNTS = "no directory of the host can be mounted yet: copy it in with 'banger cp SRC VM:PATH'"
_NO_SNAPSHOTS = "the state of a VM cannot be saved yet: a stopped VM keeps its disks, see 'banger stop'"
_NO_BUILDS = "banger builds no images: build with another tool, then 'banger pull docker-archive:FILE'"
_NO_NETWORKS = "VMs share no network yet: publish ports with 'banger run -p HOST:GUEST'"
_NO_PUSH = "images cannot be pushed: write one with 'banger image export --oci -o FILE', and let skopeo copy it"
_UPGRADES = "use 'banger update'"

# the command of the same group that means the same: the first one that the group has
_SAME_COMMANDS = {
    "remove": ("rm",),
    "destroy": ("rm",),
    "del": ("rm",),
    "uninstall": ("rm",),
    "info": ("show", "status"),
    "inspect": ("show", "status"),
    "describe": ("show", "status"),
    "get": ("show",),
    "clean": ("prune",),
    "clear": ("prune",),
    "gc": ("prune",),
    "purge": ("prune",),
    "halt": ("stop",),
    "poweroff": ("stop",),
    "shutdown": ("stop",),
    "reboot": ("restart",),
    "reload": ("restart",),
    "login": ("shell",),
    "enter": ("shell",),
    "ssh": ("shell",),
    "sh": ("shell",),
    "serial": ("console",),
    "copy": ("cp",),
    "scp": ("cp",),
    "transfer": ("cp",),
    "port": ("ports",),
    "new": ("create", "import"),
    "load": ("import",),
    "install": ("import",),
    "save": ("export",),
    "fetch": ("pull",),
    "download": ("pull",),
    "search": ("list",),
    "sync": ("refresh",),
    "update": ("refresh",),
    "check": ("verify",),
    "abort": ("cancel",),
    "kill": ("cancel",),
    "follow": ("watch",),
    "log": ("logs",),
}

# what a word means, in any group or, with the name of a group before it, in that one
_COMMANDS = {
    "ps": "use 'banger ps', or 'banger ls' for those that are stopped, too",
    "ssh": "use 'banger vm shell VM': no SSH server is needed in it",
    "shell": "use 'banger vm shell VM'",
    "sh": "use 'banger vm shell VM'",
    "enter": "use 'banger vm shell VM'",
    "login": "use 'banger vm shell VM'; banger reads the logins to registries that docker and podman have saved",
    "logout": "banger keeps no logins: it reads those that docker and podman have saved",
    "attach": "use 'banger logs -f VM' for what its command prints, or 'banger vm shell VM' for a shell",
    "create": "use 'banger vm create --image NAME', or 'banger run NAME' to start it as well",
    "launch": "use 'banger run -d IMAGE'",
    "up": "use 'banger run -d IMAGE' for a new VM, or 'banger start VM'",
    "down": "use 'banger stop VM', and 'banger rm VM' to remove it and its disks",
    "suspend": "VMs cannot be paused yet: use 'banger stop VM', which keeps its disks",
    "pause": "VMs cannot be paused yet: use 'banger stop VM', which keeps its disks",
    "resume": "use 'banger start VM'",
    "unpause": "use 'banger start VM'",
    "recover": "a VM that was removed cannot be brought back: 'banger ls' shows those that there are",
    "rename": "use 'banger vm set --name NEW VM'",
    "update": "use 'banger vm set', such as 'banger vm set --memory 2G VM'",
    "resize": "use 'banger vm set', such as 'banger vm set --disk-size 64G VM'",
    "edit": "use 'banger vm set', such as 'banger vm set --memory 2G VM'",
    "config": "use 'banger vm set' for a VM; defaults for all of them stand in ~/.config/banger/config.toml",
    "set-default": "defaults for all VMs stand in ~/.config/banger/config.toml",
    "alias": "aliases are made by your shell",
    "provision": "run what you want in it: 'banger exec VM -- COMMAND'",
    "diff": "what a VM has changed cannot be listed yet: look into it with 'banger vm shell VM'",
    "status": "use 'banger ls' for VMs, or 'banger daemon status'",
    "global-status": "use 'banger ls'",
    "info": "use 'banger inspect VM', 'banger image show NAME', or 'banger doctor' for this host",
    "port": "use 'banger vm ports VM'",
    "container": "use 'banger vm', or the short forms such as 'banger run' and 'banger ps'",
    "containers": "use 'banger ls'",
    "machine": "use 'banger vm', or the short forms such as 'banger run' and 'banger ps'",
    "instance": "use 'banger vm', or the short forms such as 'banger run' and 'banger ps'",
    "box": "use 'banger image'",
    "rmi": "use 'banger image rm NAME'",
    "build": _NO_BUILDS,
    "buildx": _NO_BUILDS,
    "bake": _NO_BUILDS,
    "package": _NO_BUILDS,
    "commit": "no image can be made of a VM yet: 'banger image import' makes one of a tar or a directory",
    "push": _NO_PUSH,
    "save": "use 'banger image export --oci -o FILE NAME'",
    "load": "use 'banger pull docker-archive:FILE'",
    "search": "use 'banger image list --available'; any image of a registry can be pulled by its name",
    "find": "use 'banger image list --available'",
    "manifest": "use 'banger image show NAME'",
    "snapshot": _NO_SNAPSHOTS,
    "snapshots": _NO_SNAPSHOTS,
    "checkpoint": _NO_SNAPSHOTS,
    "restore": _NO_SNAPSHOTS,
    "fork": "a VM cannot be copied yet: make another one of its image with 'banger run IMAGE'",
    "clone": "a VM cannot be copied yet: make another one of its image with 'banger run IMAGE'",
    "mount": _NO_MOUNTS,
    "umount": _NO_MOUNTS,
    "unmount": _NO_MOUNTS,
    "volume": _NO_MOUNTS,
    "network": _NO_NETWORKS,
    "networks": _NO_NETWORKS,
    "compose": "a set of VMs cannot be described in a file yet: start each with 'banger run -d'",
    "stack": "a set of VMs cannot be described in a file yet: start each with 'banger run -d'",
    "pod": "a set of VMs cannot be described in a file yet: start each with 'banger run -d'",
    "init": "nothing has to be set up: 'banger run' starts a VM, and 'banger doctor' checks this host",
    "setup": "nothing has to be set up: 'banger run' starts a VM, and 'banger doctor' checks this host",
    "upgrade": _UPGRADES,
    "banger uninstall": "run 'banger system uninstall', then remove banger as you installed it",
    "image commit": "no image can be made of a VM yet: 'banger image import' makes one of a tar or a directory",
    "image load": "use 'banger pull docker-archive:FILE'",
    "image save": "use 'banger image export --oci -o FILE NAME'",
    "image create": "use 'banger image import NAME --from PATH'",
    "image add": "use 'banger pull NAME', or 'banger image import NAME --from PATH'",
    "image update": "use 'banger pull --force NAME'",
    "image upgrade": "use 'banger pull --force NAME'",
    "image rename": "use 'banger image tag NAME NEW', then 'banger image rm NAME'",
    "image search": "use 'banger image list --available'; any image of a registry can be pulled by its name",
    "kernel create": "use 'banger kernel import NAME --from PATH'",
    "kernel add": "use 'banger kernel pull NAME', or 'banger kernel import NAME --from PATH'",
    "kernel build": "build it with another tool, then 'banger kernel import NAME --from PATH'",
    "kernel update": "use 'banger kernel pull --force NAME'",
    "kernel upgrade": "use 'banger kernel pull --force NAME'",
    "kernel search": "use 'banger kernel list --available'",
    "daemon reload": "use 'banger daemon restart': VMs go on meanwhile",
    "daemon kill": "use 'banger daemon stop': VMs go on meanwhile",
    "daemon info": "use 'banger daemon status'",
}  # fmt: skip

# the option of the same command that means the same, if the command has it
_SAME_OPTIONS = {
    "-m": "--memory",
    "--mem": "--memory",
    "--ram": "--memory",
    "-c": "--vcpu",
    "--cpu": "--vcpu",
    "--cpus": "--vcpu",
    "--vcpus": "--vcpu",
    "--cpuset-cpus": "--vcpu",
    "--disk": "--disk-size",
    "--storage": "--disk-size",
    "-n": "--name",
    "--hostname": "--name",
    "--background": "--detach",
    "--daemon": "--detach",
    "--network": "--net",
    "--port": "--publish",
    "--ports": "--publish",
    "--expose": "--publish",
    "--environment": "--env",
    "--cwd": "--workdir",
    "--working-dir": "--workdir",
    "--remove": "--rm",
    "--auto-remove": "--rm",
    "--hypervisor": "--vmm",
    "--driver": "--vmm",
    "--time": "--grace",
    "--timeout": "--grace",
    "--stop-timeout": "--grace",
    "-t": "--grace",
    "--lines": "--tail",
    "-y": "--force",
    "--yes": "--force",
    "-q": "--quiet",
    "--output": "--json",
    "--format": "--json",
    "--arch": "--platform",
}

_NO_LIMITS = "it is not needed: a VM has a kernel of its own, and root in it may do all that root may"
_NO_DEVICES = "devices of the host cannot be given to a VM yet"

_OF_A_NEW_VM = {
    "-v": _NO_MOUNTS,
    "--volume": _NO_MOUNTS,
    "--volumes-from": _NO_MOUNTS,
    "--mount": _NO_MOUNTS,
    "--tmpfs": "mount one in it: 'banger exec VM -- mount -t tmpfs tmpfs PATH'",
    "--privileged": _NO_LIMITS,
    "--cap-add": _NO_LIMITS,
    "--cap-drop": _NO_LIMITS,
    "--security-opt": _NO_LIMITS,
    "--userns": _NO_LIMITS,
    "--ulimit": _NO_LIMITS,
    "--sysctl": "set it in the VM: 'banger exec VM -- sysctl -w NAME=VALUE'",
    "--pid": _NO_LIMITS,
    "--ipc": _NO_LIMITS,
    "--shm-size": _NO_LIMITS,
    "--cgroupns": _NO_LIMITS,
    "--device": _NO_DEVICES,
    "--gpus": _NO_DEVICES,
    "--read-only": "a VM writes to a layer of its own: its image never changes",
    "--env-file": "give each variable with --env NAME=VALUE",
    "--platform": "VMs are of this host's architecture; 'banger pull --platform' chooses among several",
    "--pull": "use 'banger pull --force NAME' first",
    "--dns": _NO_NETWORKS,
    "--ip": _NO_NETWORKS,
    "--link": _NO_NETWORKS,
    "--add-host": "write it to /etc/hosts: 'banger exec VM -- sh -c \"echo ADDRESS NAME >> /etc/hosts\"'",
    "--health-cmd": "it is taken from the image: wait for it with 'banger run -d --wait-for health IMAGE'",
    "--cloud-init": "cloud-init is not run: give the command after --, or run it with 'banger exec VM -- COMMAND'",
    "--memory-swap": "VMs have no swap: use --memory",
    "--bridge": _NO_NETWORKS,
    "--stop-timeout": "give it when you stop the VM: 'banger stop --grace TIME VM'",
}

# with the name of the command that they are given to
_OPTIONS = {
    **{f"{command} {option}": hint for command in ("run", "create") for option, hint in _OF_A_NEW_VM.items()},
    "set --volume": _NO_MOUNTS,
    "set --mount": _NO_MOUNTS,
    "exec --privileged": "it is not needed: commands run as root unless --user names another one",
    "exec --env-file": "give each variable with --env NAME=VALUE",
    "rm -v": "it is not needed: the disks of a VM go with it",
    "rm --volumes": "it is not needed: the disks of a VM go with it",
    "kill -s": "it pulls the plug; send a signal with 'banger exec VM -- kill -s SIGNAL PID'",
    "kill --signal": "it pulls the plug; send a signal with 'banger exec VM -- kill -s SIGNAL PID'",
    "cp -r": "it is not needed: trees are copied whole",
    "cp -R": "it is not needed: trees are copied whole",
    "cp --recursive": "it is not needed: trees are copied whole",
    "cp -L": "it is not needed: a link given as SRC is followed",
    "stop --force": "use 'banger kill VM', or 'banger stop --grace 0 VM'",
    "stop -f": "use 'banger kill VM', or 'banger stop --grace 0 VM'",
    "logs -t": "the output is kept as it was printed; 'banger vm events' has times",
    "logs --timestamps": "the output is kept as it was printed; 'banger vm events' has times",
    "logs --since": "use --tail LINES",
    "pull --all-tags": "pull each tag by itself",
    "pull -a": "pull each tag by itself",
    "banger -d": "options come after the command: 'banger run -d IMAGE'",
    "banger -H": "banger speaks to the daemon of this host alone",
    "banger --host": "banger speaks to the daemon of this host alone",
}


def command_hint(path: str, known: Container[str], word: str) -> str:
    """What to use instead of the command `word`, which the group with the commands `known` has not; '' without advice.

    `path` is how the group is called: "banger vm".
    """
    group = path.rpartition(" ")[2]
    if (hint := _COMMANDS.get(f"{group} {word}")) is not None:
        return hint
    same = next((name for name in _SAME_COMMANDS.get(word, ()) if name in known), "")
    return f"use '{path} {same}'" if same else _COMMANDS.get(word, "")


def option_hint(command: str, known: Container[str], option: str) -> str:
    """What to use instead of an option that the command with the options `known` has not; '' without advice."""
    if (hint := _OPTIONS.get(f"{command} {option}")) is not None:
        return hint
    same = _SAME_OPTIONS.get(option, "")
    return f"use {same}" if same in known else ""
