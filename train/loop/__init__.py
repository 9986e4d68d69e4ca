"""From the first step to the last: batches, members, stacks, schedules, alarms."""
