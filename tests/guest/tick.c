/*
 * tick.c: the tick guest, a bare-metal i386 guest that proves that a snapshot is of one moment.
 *
 * It counts. For each n it goes, in a fixed order, through pages spread over its memory, through
 * its disks, and to the serial line: it checks that each place still holds n - 1, and then writes
 * n. So a restored guest checks all of its memory and disks against each other, and against its
 * registers, within one round. If they are of the same moment it counts on, else it says TORN and
 * stops.
 *
 * QEMU boots it with `-kernel tick.elf -append "KEY=VALUE ..."` (multiboot, 32-bit protected mode,
 * no paging). Keys:
 *   pages=N      how many pages are checked, spread evenly from 2 MiB to the top of low memory
 *                (default 256)
 *   dense=MIB    also checks and writes one word in every page of that many MiB from 2 MiB up, as
 *                load (default 0)
 *   delay=N      spins N thousand times between rounds (default 0)
 *   rest=N       rests N microseconds between rounds, at most 50000, and halts the CPU meanwhile
 *                (default 0)
 *   wait=1       halts while a disk executes a request, instead of polling for its end (default 0:
 *                KVM may not emulate `iret`)
 *   halt=N       halts for good after N rounds: an idle guest (default 0: never)
 *   nodisk=1     leaves the disks alone
 *   cpus=2       a second CPU counts independently, without end, through the pages of `dense`, in
 *                a word of its own
 *   pflash=HEX   every 64 rounds programs a byte of the CFI flash at that physical address (UEFI
 *                variables)
 *
 * Serial line: "READY <pages> pages <disks> disks", then "T <n>" each round. After a fault, as the
 * last line: "TORN <page|dense|cpu|disk> <i> has <x> want <y>" or "FAIL <what> <i>".
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

/*
 * The multiboot header (flags: the loader passes the memory size) and the entry point, which sets
 * up a stack and calls C.
 */
__asm__(".section .text\n"
        ".align 4\n"
        ".long 0x1BADB002, 2, -(0x1BADB002 + 2)\n"
        ".globl _start\n"
        "_start: cli\n"
        "  mov $stack_top, %esp\n"
        "  push %ebx\n"
        "  call tick\n"
        ".lcomm stack, 16384\n"
        ".set stack_top, stack + 16384\n");

/*
 * The code with which a second CPU begins, copied to a page that a start-up IPI can point to. It
 * goes from real mode to the first CPU's mode, sets up a stack, and calls C.
 */
#define AP_START "0x8000"
__asm__(".section .text\n"
        ".code16\n"
        "ap_begin: cli\n"
        "  xor %ax, %ax\n"
        "  mov %ax, %ds\n"
        "  lgdtl " AP_START " + ap_gdtr - ap_begin\n"
        "  mov %cr0, %eax\n"
        "  or $1, %al\n"
        "  mov %eax, %cr0\n"
        "  ljmpl $8, $" AP_START " + ap_protected - ap_begin\n"
        ".code32\n"
        "ap_protected: mov $16, %ax\n"
        "  mov %ax, %ds\n"
        "  mov %ax, %es\n"
        "  mov %ax, %ss\n"
        "  mov $ap_stack_top, %esp\n"
        "  mov $ap_tick, %eax\n"
        "  call *%eax\n"
        ".balign 8\n"
        "ap_gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff\n"
        "ap_gdtr: .word 23\n"
        "  .long " AP_START " + ap_gdt - ap_begin\n"
        "ap_end:\n"
        ".lcomm ap_stack, 4096\n"
        ".set ap_stack_top, ap_stack + 4096\n");

/*
 * For waiting: descriptor tables of the processor, and the interrupt handlers, which only end a
 * `hlt`. A disk holds its interrupt until its status is read.
 */
__asm__(".section .text\n"
        "load_tables: lgdtl own_gdtr\n"
        "  ljmpl $8, $1f\n"
        "1: mov $16, %ax\n"
        "  mov %ax, %ds\n"
        "  mov %ax, %es\n"
        "  mov %ax, %ss\n"
        "  lidtl own_idtr\n"
        "  ret\n"
        "timer_interrupt: push %eax\n"
        "  mov $0x20, %al\n" /* end of interrupt */
        "  out %al, $0x20\n"
        "  pop %eax\n"
        "  iret\n"
        "disk_interrupt: pusha\n"
        "  call disks_acknowledge\n"
        "  mov $0x20, %al\n"
        "  out %al, $0xa0\n"
        "  out %al, $0x20\n"
        "  popa\n"
        "  iret\n"
        ".balign 8\n"
        "own_gdtr: .word 23\n"
        "  .long ap_gdt\n"
        "own_idtr: .word 48 * 8 - 1\n"
        "  .long interrupts\n");
extern const u8 timer_interrupt[], disk_interrupt[];
void load_tables(void), disks_acknowledge(void);
u32 interrupts[48][2] __attribute__((aligned(8)));

struct multiboot {
    u32 flags, mem_lower, mem_upper /* KiB from 1 MiB up */, boot_device;
    const char *cmdline;
};

static inline void outb(u16 port, u8 v)
{
    __asm__ volatile("outb %0, %1" ::"a"(v), "Nd"(port) : "memory");
}
static inline void outw(u16 port, u16 v)
{
    __asm__ volatile("outw %0, %1" ::"a"(v), "Nd"(port) : "memory");
}
static inline void outl(u16 port, u32 v)
{
    __asm__ volatile("outl %0, %1" ::"a"(v), "Nd"(port) : "memory");
}
static inline u8 inb(u16 port)
{
    u8 v;
    __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port) : "memory");
    return v;
}
static inline u16 inw(u16 port)
{
    u16 v;
    __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port) : "memory");
    return v;
}
static inline u32 inl(u16 port)
{
    u32 v;
    __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port) : "memory");
    return v;
}

/* ---- waiting ---- */

enum {
    PIC1 = 0x20, PIC2 = 0xa0, PIT = 0x40,
    FIRST_VECTOR = 32, TIMER = 0, CASCADE = 2, INTERRUPTS = 16
};

static int interrupts_wanted;
static u16 unmasked;

static void interrupt_gate(u32 number, const u8 *handler)
{
    interrupts[FIRST_VECTOR + number][0] = 8 << 16 | ((u32)handler & 0xffff);
    /* 0x8e00: present, an interrupt gate */
    interrupts[FIRST_VECTOR + number][1] = ((u32) handler & 0xffff0000) | 0x8e00;
}

static void interrupt_on(u32 number)
{
    unmasked |= 1 << number;
    outb(PIC1 + 1, ~unmasked), outb(PIC2 + 1, ~unmasked >> 8);
}

static void interrupts_start(void)
{
    /*
     * Masked interrupts need a handler too: an interrupt that a disk withdraws just when it is
     * served arrives under another number.
     */
    for (u32 number = 0; number < INTERRUPTS; number++)
        interrupt_gate(number, number == TIMER ? timer_interrupt : disk_interrupt);
    load_tables();
    outb(PIC1, 0x11), outb(PIC1 + 1, FIRST_VECTOR), outb(PIC1 + 1, 1 << CASCADE), outb(PIC1 + 1, 1);
    outb(PIC2, 0x11), outb(PIC2 + 1, FIRST_VECTOR + 8), outb(PIC2 + 1, CASCADE), outb(PIC2 + 1, 1);
    interrupt_on(CASCADE);
    interrupt_on(TIMER);
}

/* Starts the timer, which interrupts once after this many microseconds. */
static void timer(u32 microseconds)
{
    u32 count = microseconds * 1193 / 1000;

    outb(PIT + 3, 0x30); /* counter 0: one interrupt when it has counted down */
    outb(PIT, count), outb(PIT, count >> 8);
}

/* Waits until there is an interrupt. */
static void await_interrupt(void)
{
    __asm__ volatile("sti; hlt; cli" ::: "memory");
}

/* ---- serial line ---- */

enum { COM1 = 0x3f8, LINE_STATUS = COM1 + 5, TRANSMIT_EMPTY = 0x20 };

static void put(const char *s)
{
    for (; *s; s++) {
        while (!(inb(LINE_STATUS) & TRANSMIT_EMPTY))
            ;
        outb(COM1, *s);
    }
}

static void put_number(u32 v)
{
    char digits[11], *p = digits + 10;

    *p = 0;
    do
        *--p = '0' + v % 10;
    while (v /= 10);
    put(p);
}

static void __attribute__((noreturn)) stop(void)
{
    for (;;)
        __asm__ volatile("cli; hlt");
}

static void __attribute__((noreturn)) fail(const char *what, u32 i)
{
    put("FAIL "), put(what), put(" "), put_number(i), put("\n");
    stop();
}

/* The proof: if a place does not hold what was last written to it, the snapshot is torn. */
static void expect(const char *what, u32 i, u32 has, u32 want)
{
    if (has == want)
        return;
    put("TORN "), put(what), put(" "), put_number(i), put(" has "), put_number(has), put(" want "),
        put_number(want);
    put("\n");
    stop();
}

/* ---- parameters ---- */

/*
 * Returns the value of " KEY=" in the command line, as a number in the given base; `otherwise` if
 * the key is missing.
 */
static u32 parameter(const char *line, const char *key, u32 base, u32 otherwise)
{
    for (; *line; line++) {
        const char *k = key, *p = line + 1;
        u32 v = 0;

        if (*line != ' ')
            continue;
        while (*k && *p == *k)
            k++, p++;
        if (*k || *p++ != '=')
            continue;
        if (base == 16 && p[0] == '0' && p[1] == 'x')
            p += 2;
        for (;; p++) {
            u32 digit = *p >= 'a' ? *p - 'a' + 10u : *p - '0' + 0u;

            if (*p == 0 || *p == ' ')
                return v;
            if (digit >= base)
                fail(key, *p);
            v = v * base + digit;
        }
    }
    return otherwise;
}

/*
 * ---- disks: virtio-blk by its legacy interface, one request at a time ----
 *
 * Polling for the end of a request would take CPU time from QEMU's other threads, which execute it.
 * So the guest halts meanwhile, and checks after PATIENCE nevertheless: it does not test for lost
 * interrupts.
 */

enum {
    MAX_DISKS = 8,
    MAX_QUEUE = 1024, /* QEMU 10.0.13 has this size whatever its queue-size */
    SECTOR_WORDS = 128,
    ROTATION = 64, /* besides the fixed sector, one of this many is written each round, ... */
    ROTATION_START = 1024, /* ... from this sector on, ... */
    ROTATION_STRIDE = 128, /* ... one in each 64 KiB, that is, in each cluster of a qcow2 image */
    FIXED_SECTOR = 8,
    PCI_VIRTIO_BLK = 0x10011af4,
    FEATURE_FLUSH = 1 << 9, /* without it QEMU makes every write a write-through: slow */
    READ = 0,
    WRITE = 1,
    PATIENCE = 50000, /* microseconds */
};

static struct disk {
    u16 port, queue_size, next, interrupts;
    volatile u16 *avail; /* flags, index, ring */
    volatile u16 *used;  /* flags, index, ring */
    struct { u32 address, address_high, length; u16 flags, next; } *descriptors;
} disks[MAX_DISKS];
static u32 disk_count;
static u8 rings[MAX_DISKS][8 * 4096] __attribute__((aligned(4096)));
static struct { u32 type, reserved; u32 sector, sector_high; } request;
static volatile u32 sector_data[SECTOR_WORDS];
static volatile u8 request_status;

/* Handles all disks: they share an interrupt, which may come when no code waits for its disk. */
void disks_acknowledge(void)
{
    for (u32 i = 0; i < disk_count; i++)
        inb(disks[i].port + 19);
}

static void disk_io(u32 i, u32 type, u32 sector)
{
    struct disk *d = &disks[i];

    request.type = type;
    request.sector = sector;
    request_status = 0xff;
    d->descriptors[1].flags = 1 /* next */ | (type == READ ? 2 : 0) /* the device writes */;
    d->avail[2 + d->next % d->queue_size] = 0;
    __asm__ volatile("" ::: "memory");
    d->avail[1] = ++d->next;
    __asm__ volatile("mfence" ::: "memory");
    outw(d->port + 16, 0); /* notify queue 0 */
    for (u32 again = 0; d->used[1] != d->next; again = 1) {
        if (!d->interrupts) {
            __asm__ volatile("pause" ::: "memory");
            continue;
        }
        if (again)
            timer(PATIENCE);
        await_interrupt();
    }
    if (request_status != 0)
        fail("disk", i);
}

static void disk_start(u16 port, u8 interrupt)
{
    struct disk *d = &disks[disk_count];
    u8 *ring = rings[disk_count];

    outb(port + 18, 0);     /* reset: the BIOS has used the disk */
    outb(port + 18, 1 | 2); /* acknowledge, driver */
    outl(port + 4, inl(port) & FEATURE_FLUSH);
    outw(port + 14, 0); /* queue 0 */
    d->port = port;
    d->queue_size = inw(port + 12);
    if (d->queue_size < 3 || d->queue_size > MAX_QUEUE)
        fail("queue", d->queue_size);
    d->descriptors = (void *)ring;
    d->avail = (void *)(ring + 16 * d->queue_size);
    d->used = (void *)(ring + ((16 * d->queue_size + 6 + 2 * d->queue_size + 4095) & ~4095));
    /* The BIOS has assigned the interrupt. */
    d->interrupts =
        interrupts_wanted && interrupt != TIMER && interrupt != CASCADE && interrupt < INTERRUPTS;
    d->avail[0] = !d->interrupts;
    if (d->interrupts)
        interrupt_on(interrupt);
    d->descriptors[0].address = (u32)&request, d->descriptors[0].length = sizeof request;
    d->descriptors[0].flags = 1, d->descriptors[0].next = 1;
    d->descriptors[1].address = (u32)sector_data, d->descriptors[1].length = sizeof sector_data;
    d->descriptors[1].next = 2;
    d->descriptors[2].address = (u32)&request_status, d->descriptors[2].length = 1;
    d->descriptors[2].flags = 2;
    outl(port + 8, (u32)ring >> 12);
    outb(port + 18, 1 | 2 | 4); /* driver is ready */
    disk_count++;
}

static void disk_write(u32 i, u32 sector, u32 n)
{
    for (u32 w = 0; w < SECTOR_WORDS; w++)
        sector_data[w] = w == 1 ? i : n;
    disk_io(i, WRITE, sector);
}

static void disk_check(u32 i, u32 sector, u32 want)
{
    disk_io(i, READ, sector);
    expect("disk", i, sector_data[0], want);
    expect("disk", i, sector_data[1], i);
    expect("disk", i, sector_data[SECTOR_WORDS - 1], want);
}

static u32 rotating_sector(u32 n) { return ROTATION_START + n % ROTATION * ROTATION_STRIDE; }

static u32 pci_read(u32 slot, u32 reg)
{
    outl(0xcf8, 0x80000000 | slot << 8 | reg);
    return inl(0xcfc);
}

/* Looks through bus 0, every function, in the order of the `-device` options. */
static void disks_find(void)
{
    for (u32 slot = 0; slot < 256 && disk_count < MAX_DISKS; slot++) {
        if (pci_read(slot, 0) != PCI_VIRTIO_BLK)
            continue;
        if (!(pci_read(slot, 0x10) & 1))
            fail("bar", slot);
        pci_read(slot, 4);
        outw(0xcfc, 1 | 2 | 4); /* command: I/O, memory, bus mastering */
        disk_start(pci_read(slot, 0x10) & ~3, pci_read(slot, 0x3c));
    }
}

/* ---- memory ---- */

enum { PAGE = 4096, MEMORY_START = 2 << 20, DENSE_WORD = 512 };

static u32 page_count, page_stride, dense_count;

static volatile u32 *page_at(u32 i) { return (volatile u32 *)(MEMORY_START + i * page_stride); }

static void page_write(u32 i, u32 n)
{
    volatile u32 *page = page_at(i);

    page[0] = n, page[1] = i, page[1022] = i, page[1023] = n;
}

static void page_check(u32 i, u32 want)
{
    volatile u32 *page = page_at(i);

    expect("page", i, page[0], want);
    expect("page", i, page[1], i);
    expect("page", i, page[1022], i);
    expect("page", i, page[1023], want);
}

static volatile u32 *dense_at(u32 i)
{
    return (volatile u32 *) (MEMORY_START + i * PAGE) + DENSE_WORD;
}

/* ---- a second CPU ---- */

extern const u8 ap_begin[], ap_end[];
static volatile u32 ap_rounds, ap_torn_at, ap_torn_has, ap_torn_want, ap_torn;

/* The first CPU, which has the serial line, reports what this one finds. */
void __attribute__((noreturn)) ap_tick(void);
void __attribute__((noreturn)) ap_tick(void)
{
    for (u32 n = 1;; n++) {
        for (u32 i = 0; i < dense_count; i++) {
            volatile u32 *word = dense_at(i) + 1;

            if (*word != n - 1) {
                ap_torn_at = i, ap_torn_has = *word, ap_torn_want = n - 1, ap_torn = 1;
                stop();
            }
            *word = n;
        }
        ap_rounds = n;
    }
}

static void ap_start(void)
{
    volatile u32 *command = (volatile u32 *)0xfee00300;
    volatile u8 *to = (volatile u8 *)0x8000;

    for (u32 i = 0; i < (u32)(ap_end - ap_begin); i++)
        to[i] = ap_begin[i];
    *command = 0xc4500; /* INIT to all others */
    for (volatile u32 spin = 100000; spin; spin--)
        ;
    *command = 0xc4600 | 0x8; /* start-up, at page 8 */
    while (!ap_rounds)
        __asm__ volatile("pause" ::: "memory");
}

static void ap_check(void)
{
    if (ap_torn)
        expect("cpu", ap_torn_at, ap_torn_has, ap_torn_want);
}

/* ---- UEFI variable storage ---- */

static void pflash_program(u32 address, u32 n)
{
    volatile u8 *byte = (volatile u8 *)(address + n / 64 % 4096);

    *byte = 0x40; /* "program byte": the next write is the byte */
    *byte = n / 64;
    *byte = 0xff; /* back to reading */
}

/* ---- the rounds ---- */

void tick(const struct multiboot *boot);
void tick(const struct multiboot *boot)
{
    const char *line = boot->flags & 4 ? boot->cmdline : "";
    u32 delay = parameter(line, "delay", 10, 0), pflash = parameter(line, "pflash", 16, 0);
    u32 halt = parameter(line, "halt", 10, 0), resting = parameter(line, "rest", 10, 0);
    /* The BIOS keeps tables in the last 256 KiB or so of low memory. */
    u32 memory_end = (1u << 20) + boot->mem_upper * 1024 - (1u << 20);
    u32 pages_there = (memory_end - MEMORY_START) / PAGE;

    page_count = parameter(line, "pages", 10, 256);
    dense_count = parameter(line, "dense", 10, 0) * 256;
    if (page_count == 0 || page_count > pages_there || dense_count > pages_there)
        fail("memory", pages_there);
    page_stride = pages_there / page_count * PAGE;
    interrupts_wanted = resting || parameter(line, "wait", 10, 0);
    if (interrupts_wanted)
        interrupts_start();
    if (!parameter(line, "nodisk", 10, 0))
        disks_find();

    for (u32 i = 0; i < page_count; i++)
        page_write(i, 0);
    for (u32 i = 0; i < dense_count; i++)
        dense_at(i)[0] = dense_at(i)[1] = 0;
    for (u32 i = 0; i < disk_count; i++) {
        disk_write(i, FIXED_SECTOR, 0);
        for (u32 r = 0; r < ROTATION; r++)
            disk_write(i, rotating_sector(r), 0);
    }
    if (parameter(line, "cpus", 10, 1) > 1)
        ap_start();
    if (resting > 50000)
        fail("rest", resting);
    put("READY "), put_number(page_count), put(" pages "), put_number(disk_count), put(" disks\n");

    for (u32 n = 1;; n++) {
        for (u32 i = 0; i < page_count; i++) {
            page_check(i, n - 1);
            page_write(i, n);
        }
        for (u32 i = 0; i < dense_count; i++) {
            expect("dense", i, *dense_at(i), n - 1);
            *dense_at(i) = n;
        }
        /*
         * Two sectors of a disk, because the instant can fall between the check of one sector and
         * the write that hides its fault: then the other sector is still to be checked.
         */
        if (interrupts_wanted && disk_count)
            timer(PATIENCE);
        for (u32 i = 0; i < disk_count; i++) {
            disk_check(i, FIXED_SECTOR, n - 1);
            disk_write(i, FIXED_SECTOR, n);
            disk_check(i, rotating_sector(n - 1), n - 1);
            disk_check(i, rotating_sector(n), n > ROTATION ? n - ROTATION : 0);
            disk_write(i, rotating_sector(n), n);
        }
        ap_check();
        if (pflash && n % 64 == 0)
            pflash_program(pflash, n);
        put("T "), put_number(n), put("\n");
        while (n == halt) /* an NMI would wake it */
            __asm__ volatile("cli; hlt");
        for (volatile u32 spin = delay * 1000; spin; spin--)
            ;
        if (resting)
            timer(resting), await_interrupt();
    }
}
