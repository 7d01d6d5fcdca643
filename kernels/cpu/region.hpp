// Threads that run one function at the same time: those of the process's OpenMP runtime, where it has one.
//
// torch's OpenMP threads spin for milliseconds after its last operation. Threads of our own would share the cores with
// them; in a region of the same runtime they are the ones that work, and they are awake. Where there is none, threads live
// for one call: making and joining one takes 8 us.
#pragma once

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#if __has_include(<dlfcn.h>) && __has_include(<pthread.h>)
#include <dlfcn.h>
#include <pthread.h>
#define SOSD_OPENMP
#endif

namespace sosd_fast {

#if defined(SOSD_OPENMP)
// libgomp's entry; the runtimes of LLVM and Intel have it, too. It was made for compilers, so that it cannot change.
using OpenMPRegion = void (*)(void (*function)(void*), void* context, unsigned threads, unsigned flags);

// libgomp waits for ever for threads that a fork has not copied, so that a forked process never asks for them. The
// handler stands from when the library is loaded: torch may have made its threads before the first call.
inline std::atomic<bool> forked{false};
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

inline OpenMPRegion openmp_region() {
    static const auto found = reinterpret_cast<OpenMPRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return forked || fork_handler != 0 ? nullptr : found;
}
#endif

// Calls work() on this thread and others, `wanted` in all or more or fewer, and returns when all have returned. work does
// not throw. A region has all n_threads: libgomp ends those that a smaller one leaves over, and torch's next operation
// would have to start them again.
template <class F> void run_region(int wanted, [[maybe_unused]] int n_threads, F& work) {
    if (wanted <= 1) return work();
#if defined(SOSD_OPENMP)
    if (const OpenMPRegion region = openmp_region())
        return region([](void* f) { (*static_cast<F*>(f))(); }, &work, unsigned(n_threads), 0);
#endif
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < wanted; ++i) others.emplace_back([&] { work(); });
    } catch (const std::exception&) {  // no more threads or memory to be had: those that run do all
    }
    work();
    for (std::thread& t : others) t.join();
}

}  // namespace sosd_fast
