// Threads over a list of matrices, and over the parts of one.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

#include "arena.hpp"

namespace sosd_fast {

// Threads that first take whole matrices and, when none are left, help the matrices still in work.
class Team {
public:
    // A job is open until every index is taken; the opener waits until every index is done.
    void run(int64_t count, void (*task)(void*, int64_t), void* context) {
        if (count > 1 && idle_.load(std::memory_order_relaxed) > 0) {
            Job job{task, context, count};
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                jobs_.push_back(&job);
            }
            wake_.notify_all();
            for (int64_t i; (i = job.next.fetch_add(1)) < count;) task(context, i);
            std::unique_lock<std::mutex> lock(mutex_);
            jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
            done_.wait(lock, [&] { return job.helpers == 0; });
            return;
        }
        for (int64_t i = 0; i < count; ++i) task(context, i);
    }

    bool helpers() const { return idle_.load(std::memory_order_relaxed) > 0; }

    void help_until_finished() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (working_ > 0) {
            Job* job = nullptr;
            for (Job* candidate : jobs_)
                if (candidate->next.load() < candidate->count) job = candidate;
            if (!job) {
                wake_.wait(lock);
                continue;
            }
            ++job->helpers;
            lock.unlock();
            for (int64_t i; (i = job->next.fetch_add(1)) < job->count;) job->task(job->context, i);
            lock.lock();
            if (--job->helpers == 0) done_.notify_all();
        }
        --idle_;
    }

    // A thread that will never own a matrix counts as idle before it runs, so that the first stage already shares.
    void start(int working, int helping) { working_ = working, idle_ = helping; }
    void stop_working() {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++idle_;
        if (--working_ == 0) wake_.notify_all();
    }

private:
    struct Job {
        void (*task)(void*, int64_t);
        void* context;
        int64_t count;
        std::atomic<int64_t> next{0};
        int helpers = 0;
        Job(void (*t)(void*, int64_t), void* c, int64_t n) : task(t), context(c), count(n) {}
    };
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<Job*> jobs_;
    std::atomic<int> idle_{0};
    int working_ = 0;
};

// Below this many operations a thread costs more to start than it saves: as the owner of matrices, and as a mere helper
// (one 256 x 256: 0.41 ms alone, 0.5 to 1.6 with a helper; one 768 x 768: 7.4 and 6.9).
constexpr double kWorthAThread = 2e6, kWorthHelpers = 5e8;

// Runs solve(i, arena, parallel) for each matrix, the dearest first. Threads live for one call only.
template <class F> void for_each(const std::vector<double>& costs, int n_threads, F solve) {
    const int64_t count = int64_t(costs.size());
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), int64_t(0));
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
    const double total = std::accumulate(costs.begin(), costs.end(), 0.0);
    int threads = int(std::clamp(total / kWorthAThread, 1.0, double(std::max(1, n_threads))));
    const int workers = int(std::min<int64_t>(threads, std::max<int64_t>(count, 1)));
    if (total < kWorthHelpers) threads = workers;

    Team team;
    team.start(workers, threads - workers);
    const Parallel parallel{
        &team,
        [](void* t, int64_t n, void (*task)(void*, int64_t), void* c) { static_cast<Team*>(t)->run(n, task, c); },
        [](void* t) { return static_cast<Team*>(t)->helpers(); }};
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
    const auto work = [&](bool owner) {
        if (owner) {
            try {
                Arena memory;
                for (int64_t i; (i = next.fetch_add(1)) < count;) solve(order[i], memory, parallel);
            } catch (const std::bad_alloc&) {
                out_of_memory = true;
            }
            team.stop_working();
        }
        team.help_until_finished();
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) {
        try {
            others.emplace_back(work, i < workers);
        } catch (const std::system_error&) {  // no more threads to be had: the others do the work
            for (; i < workers; ++i) team.stop_working();
            break;
        }
    }
    work(true);
    for (std::thread& t : others) t.join();
    if (out_of_memory) throw std::bad_alloc();
}

}  // namespace sosd_fast
