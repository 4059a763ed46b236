"""What a GPU can do, and what part of it lmserve gets: ``scripts/bench_gpu.sh``.

One section is one module with ``run(setting)``, which yields rows as they are measured; ``__main__`` gives each a
process of its own and a part of the time.
"""

from benchmarks.gpu.optional import stand_in_for_llguidance

stand_in_for_llguidance()  # here, so that it comes before whatever imports the runtime
