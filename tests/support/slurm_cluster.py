"""A SLURM cluster of one node on this machine, in a temporary folder; needs root and Debian's slurm-wlm and munge."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIGURATION = """
ClusterName=llmjax
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
GetEnvTimeout=100
KillWait=60
NodeName=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
WAIT = 240  # seconds; an idle machine needs a few


def skip_reason():
  """Return why no cluster can run here, or an empty text; install SLURM if LLMJAX_SLURM_TEST=install."""
  if not sys.platform.startswith("linux") or os.geteuid() != 0:
    return "a SLURM cluster needs Linux and root"
  if all(map(find_daemon, DAEMONS)):
    return ""
  if os.environ.get("LLMJAX_SLURM_TEST") != "install":
    return "SLURM is not installed; LLMJAX_SLURM_TEST=install installs Debian's slurm-wlm and munge"
  if shutil.which("apt-get") is None:
    return "SLURM is not installed, and there is no apt-get"
  quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
  subprocess.run(["apt-get", "update", "-qq"], env=quiet, capture_output=True)
  command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge"]
  done = subprocess.run(command, env=quiet, capture_output=True, text=True)
  return "" if done.returncode == 0 else f"SLURM cannot be installed: {done.stderr.strip()[-300:]}"


def find_daemon(daemon):
  return shutil.which(daemon, path=f"/usr/sbin{os.pathsep}{os.environ['PATH']}")


class SlurmCluster:
  """A controller and a node on this machine, with all their files in `folder`."""

  def __init__(self, folder):
    self.folder, self.configuration = folder, folder / "slurm.conf"
    self.daemons = {}
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    with socket.socket() as one, socket.socket() as other:
      for each in (one, other):
        each.bind(("127.0.0.1", 0))
      ports = [each.getsockname()[1] for each in (one, other)]
    self.configuration.write_text(CONFIGURATION.format(folder=folder, ports=ports))
    for name in ("state", "spool"):
      (folder / name).mkdir()

  def start(self, name, *words):
    with open(self.folder / f"{name}.out", "ab") as out:
      self.daemons[name] = subprocess.Popen([find_daemon(name), *words], stdout=out, stderr=out)

  def start_all(self):
    files = [f"--{name}-file={self.folder / name}" for name in ("key", "pid", "seed", "log")]
    self.start("munged", "--foreground", f"--socket={self.folder / 'munge.socket'}", *files)
    wait_for(lambda: (self.folder / "munge.socket").exists())
    self.start("slurmctld", "-D", "-f", str(self.configuration))
    self.start_node()

  def start_node(self):
    self.start("slurmd", "-D", "-N", "localhost", "-f", str(self.configuration))
    wait_for(lambda: self.query("sinfo", "--noheader", "--format=%T").strip() in ("idle", "mixed", "allocated"))

  def query(self, *words):
    return subprocess.run(words, capture_output=True, text=True).stdout

  def kill_node(self):
    """Kill all its processes at once, as a power cut does: they are stopped first, so that none reports another."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
      for process in self.node_processes():
        with contextlib.suppress(ProcessLookupError):
          os.kill(process, number)

  def node_processes(self):
    """Yield ids of the node's processes: jobs, and daemons, which overwrite their environment but open its log."""
    for folder in Path("/proc").glob("[0-9]*"):
      with contextlib.suppress(OSError):
        variables = set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
        opened = {os.readlink(link) for link in (folder / "fd").iterdir()}
        job = {f"SLURM_CONF={self.configuration}", "SLURMD_NODENAME=localhost"} <= variables
        if job or str(self.folder / "slurmd.log") in opened:
          yield int(folder.name)

  def stop_all(self):
    self.kill_node()
    for daemon in self.daemons.values():
      daemon.terminate()
    for daemon in self.daemons.values():
      with contextlib.suppress(subprocess.TimeoutExpired):
        daemon.wait(2)
      daemon.kill()
      daemon.wait()


def wait_for(condition):
  """Wait until `condition()` is true; fail after WAIT seconds."""
  deadline = time.monotonic() + WAIT
  while not condition():
    assert time.monotonic() < deadline, f"not within {WAIT} s"
    time.sleep(0.1)
