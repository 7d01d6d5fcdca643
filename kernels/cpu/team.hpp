// Threads over a list of matrices, and over the parts of one.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <numeric>
#include <optional>
#include <thread>
#include <vector>

#include "arena.hpp"
#include "region.hpp"

namespace sosd_fast {

// Some 2 us at most where no other thread wants the core.
inline void pause() {
#if defined(__x86_64__)
    for (int i = 0; i < 8; ++i) __builtin_ia32_pause();
#endif
    std::this_thread::yield();
}

// Waits for what another thread does within microseconds, else returns: waking a thread takes 5 to 50 us, and
// the two-stage reduction of a 2048 x 2048 has 500 jobs, tens of microseconds apart.
template <class F> void spin_until(F done) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    while (!done() && std::chrono::steady_clock::now() < end) pause();
}

// Threads that first take whole matrices and, when none are left, help the matrices still in work.
class Team {
public:
    Team(int64_t matrices, int64_t threads) : unfinished_(matrices), threads_(threads) {}

    // A job is open until every index is taken; the opener waits until every index is done.
    void run(int64_t count, void (*task)(void*, int64_t), void* context) {
        if (count > 1 && helpers()) {
            Job job{task, context, count};
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                jobs_.push_back(&job);
                ++posted_;
            }
            wake_.notify_all();
            for (int64_t i; (i = job.next.fetch_add(1)) < count;) task(context, i);
            std::unique_lock<std::mutex> lock(mutex_);
            jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
            if (job.helpers > 0) {
                lock.unlock();
                spin_until([&] { return job.helpers == 0; });
                lock.lock();
            }
            done_.wait(lock, [&] { return job.helpers == 0; });
            return;
        }
        for (int64_t i = 0; i < count; ++i) task(context, i);
    }

    // Another thread is idle, or will be when it has come.
    bool helpers() const { return unfinished_.load(std::memory_order_relaxed) < threads_; }

    // Returns when every matrix is finished. It does not matter how many threads come, or whether any does.
    void help_until_finished() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (bool spun = false; unfinished_ > 0;) {
            Job* job = nullptr;
            for (Job* candidate : jobs_)
                if (candidate->next.load() < candidate->count) job = candidate;
            if (!job) {
                if (spun) {
                    wake_.wait(lock);
                } else {
                    const int64_t seen = posted_;
                    lock.unlock();
                    spin_until([&] { return posted_ != seen || unfinished_ == 0; });
                    lock.lock();
                }
                spun = !spun;
                continue;
            }
            spun = false;
            ++job->helpers;
            lock.unlock();
            for (int64_t i; (i = job->next.fetch_add(1)) < job->count;) job->task(job->context, i);
            lock.lock();
            if (--job->helpers == 0) done_.notify_all();
        }
    }

    void finish_matrix() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (--unfinished_ == 0) wake_.notify_all();
    }

private:
    struct Job {
        void (*task)(void*, int64_t);
        void* context;
        int64_t count;
        std::atomic<int64_t> next{0};
        std::atomic<int> helpers{0};
        Job(void (*t)(void*, int64_t), void* c, int64_t n) : task(t), context(c), count(n) {}
    };
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<Job*> jobs_;
    std::atomic<int64_t> unfinished_, posted_{0};
    const int64_t threads_;
};

// Below this many operations a thread costs more to wake than it saves: as the owner of matrices, and as a mere helper.
// 2e6 take about 18 us in AVX-512. A region costs 0.6 us when its threads are awake, up to 120 us when they sleep.
constexpr double kWorthAThread = 2e6, kWorthHelpers = 5e8;

// Runs solve(i, arena, parallel) for each matrix, the dearest first, on at most n_threads threads.
template <class F> void for_each(const std::vector<double>& costs, int n_threads, F solve) {
    const int64_t count = int64_t(costs.size());
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), int64_t(0));
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
    const double total = std::accumulate(costs.begin(), costs.end(), 0.0);
    int64_t threads = int64_t(std::clamp(total / kWorthAThread, 1.0, double(std::max(1, n_threads))));
    if (total < kWorthHelpers) threads = std::min(threads, count);

    Team team(count, threads);
    const Parallel parallel{
        &team,
        [](void* t, int64_t n, void (*task)(void*, int64_t), void* c) { static_cast<Team*>(t)->run(n, task, c); },
        [](void* t) { return static_cast<Team*>(t)->helpers(); }, pause};
    std::atomic<int64_t> next{0}, arrived{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // of the first failure; it must not leave the region
    auto work = [&] {
        if (arrived.fetch_add(1) >= threads) return;
        {
            std::optional<Arena> memory;
            for (int64_t i; (i = next.fetch_add(1)) < count;) {
                try {
                    if (!memory) memory.emplace();
                    if (!failed) solve(order[i], *memory, parallel);
                } catch (...) {
                    if (!failed.exchange(true)) error = std::current_exception();
                }
                team.finish_matrix();
            }
        }
        team.help_until_finished();
    };
    run_region(int(threads), n_threads, work);
    if (error) std::rethrow_exception(error);
}

}  // namespace sosd_fast
