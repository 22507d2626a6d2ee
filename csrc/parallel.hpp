// Work that is independent is shared out among threads here and nowhere else.
#pragma once

#include <cstdint>

#include <omp.h>

namespace seqmix {

// Whether this process was forked from one that had the kernels loaded. OpenMP's threads do not survive a fork, and
// waiting for them would take for ever, so such a process (a worker that loads data, for instance) runs one task
// after the other. Set by module.cpp.
inline bool is_forked = false;

// body(task, thread) for every task, on at most `threads` threads, in any order. `thread` counts from 0 and names
// the workspace to use. OpenMP's library is the one that PyTorch has loaded, so both share their threads.
template <class Body>
void for_each_task(int64_t tasks, int threads, const Body& body) {
    if (threads <= 1 || tasks <= 1 || is_forked) {
        for (int64_t task = 0; task < tasks; ++task) body(task, 0);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
}

}  // namespace seqmix
