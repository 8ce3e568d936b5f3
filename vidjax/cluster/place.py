"""The flags that say which of several processes this is. Nothing here needs jax."""

from typing import NamedTuple

from vidjax.errors import UserError

AUTO = "auto"  # the address that stands for what the launcher of the cluster says
FLAGS = ("--coordinator", "--num_processes", "--process_id")


class Place(NamedTuple):
    """The place of this process among those of a run: the flags of the command.

    Attributes:
      coordinator: `HOST:PORT` of process 0, or AUTO.
      num_processes: number of processes; None with AUTO.
      process_id: number of this process, from 0; None with AUTO.
    """

    coordinator: str
    num_processes: int | None
    process_id: int | None

    @classmethod
    def parse(
        cls, coordinator: str | None, count: str | None, number: str | None
    ) -> "Place | None":
        """Returns the place that flags name, None without any.

        Raises:
          ValueError: a flag is missing, or is no number or no address.
        """
        flags = dict(zip(FLAGS, (coordinator, count, number), strict=True))
        given = [flag for flag, value in flags.items() if value is not None]
        if not given:
            return None
        if coordinator == AUTO and given == ["--coordinator"]:
            return cls(AUTO, None, None)
        missing = [flag for flag in flags if flag not in given]
        if missing or coordinator == AUTO:
            raise UserError(
                f"{', '.join(given)}: several processes need all of {', '.join(FLAGS)},\n"
                "or --coordinator=auto alone under Slurm, Open MPI, Kubernetes or on a TPU pod"
            )
        host, colon, port = str(coordinator).rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
            raise UserError(
                f"--coordinator={coordinator}: not HOST:PORT\n"
                "name the machine of process 0 and a free port: --coordinator=10.0.0.1:9876"
            )
        numbers = []
        for flag, value in (("--num_processes", count), ("--process_id", number)):
            if not str(value).isdecimal():
                raise UserError(f"{flag}={value}: not a number from 0 on")
            numbers.append(int(str(value)))
        if numbers[1] >= numbers[0]:
            raise UserError(
                f"--process_id={number}: must be below --num_processes={count}\n"
                "the processes have the numbers 0, 1, ... of one each"
            )
        return cls(str(coordinator), *numbers)
