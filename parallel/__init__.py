"""Who does what, when: schedules, their verification, and the executor that carries them out."""
