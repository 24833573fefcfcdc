"""`banger vm`: the table of its commands."""

from __future__ import annotations

from banger.cli.lazy import Entry, LazyGroup

VM = LazyGroup(
    "vm",
    {
        "run": Entry("vm_run", "run", "Create a VM, start it and run a command or a shell in it.", "Create"),
        "create": Entry("vm_run", "create", "Create a VM without starting it.", "Create"),
        "start": Entry("vm_lifecycle", "start", "Start VMs.", "Lifecycle"),
        "stop": Entry("vm_lifecycle", "stop", "Stop VMs, by force after a grace period.", "Lifecycle"),
        "restart": Entry("vm_lifecycle", "restart", "Stop VMs and start them again.", "Lifecycle"),
        "kill": Entry("vm_lifecycle", "kill", "Stop VMs at once, like pulling the plug.", "Lifecycle"),
        "rm": Entry("vm_lifecycle", "remove", "Remove VMs and their disks.", "Lifecycle"),
        "set": Entry("vm_set", "set_vm", "Change what a VM is: processors, disks, name, labels, ports.", "Lifecycle"),
        "prune": Entry("vm_lifecycle", "prune", "Remove every stopped VM.", "Lifecycle"),
        "list": Entry("vm_list", "list_vms", "List all VMs.", "Look"),
        "show": Entry("vm_list", "show", "Show one VM.", "Look"),
        "inspect": Entry("vm_watch", "inspect", "Print all that is known of VMs as JSON.", "Look"),
        "wait": Entry("vm_watch", "wait", "Wait until VMs are stopped, or in another state.", "Look"),
        "events": Entry("vm_watch", "events", "Follow what happens to VMs.", "Look"),
        "stats": Entry("vm_stats", "stats", "Show what running VMs take of processors, memory, disk, network.", "Look"),
        "top": Entry("vm_top", "top", "List the processes in a running VM.", "Look"),
        "ports": Entry("vm_ports", "ports", "List what listens in a running VM, and where the host finds it.", "Look"),
        "logs": Entry("vm_list", "logs", "Print the output of a VM's main command or its console.", "Look"),
        "exec": Entry("vm_exec", "execute", "Run a command in a running VM.", "Work inside"),
        "shell": Entry("vm_exec", "shell", "Open a login shell in a running VM.", "Work inside"),
        "console": Entry("vm_console", "console", "Use the serial console of a running VM.", "Work inside"),
        "cp": Entry("vm_copy", "copy", "Copy files and trees into and out of a running VM.", "Work inside"),
    },
    help="""Create, run, enter and remove virtual machines.

    A VM is named by its name, its id, or a unique beginning of its id.""",
    examples="""
    banger vm run --name web          a new machine, and a shell in it
    banger vm list
    banger vm shell web
    banger vm stop web
    banger vm rm web
    """,
)
