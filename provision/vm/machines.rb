# What each VM gets, by provision/services and .env: its address, its memory, its services, its settings.
# The Vagrantfile reads it. Without a VM: ruby provision/vm/machines.rb prints the plan, without secrets.

module Machines
  Error = Class.new(StandardError)
  Service = Struct.new(:name, :machine, :database, :broker, :calls)
  Machine = Struct.new(:name, :ip, :memory_mb, :services, :settings)

  # What every service reads, what a client of the broker reads, and what the broker's machine needs besides.
  COMMON = "(AUTH|HTTP|LOG|STORE)_.*"
  BROKER = "RABBITMQ_(HOST|PORT|VHOST|QUEUE|HEARTBEAT_S)"
  BROKER_SERVER = "RABBITMQ_(MANAGEMENT_PORT|ADMIN_USER|ADMIN_PASSWORD)"

  module_function

  # The largest machine first: where there is no dist/, the first one compiles for all.
  def all(root)
    services = read_services(File.join(root, "provision/services"))
    settings = read_settings(File.join(root, ".env"))
    ips = services.map(&:machine).uniq.to_h { |machine| [machine, fetch(settings, "#{prefix(machine)}_IP")] }
    in_vms = in_vms(settings, services, ips)
    machines = ips.map do |machine, ip|
      own = services.select { |service| service.machine == machine }
      memory_mb = fetch(settings, "#{prefix(machine)}_MEMORY_MB").to_i
      Machine.new(machine, ip, memory_mb, own, in_vms.slice(*needed(own, services, in_vms.keys)))
    end
    machines.sort_by { |machine| -machine.memory_mb }
  end

  # gateway-vm has VM_GATEWAY_IP and VM_GATEWAY_MEMORY_MB.
  def prefix(machine)
    "VM_#{machine.delete_suffix("-vm").tr("-", "_").upcase}"
  end

  # The settings as they are in the VMs: VM_NAME replaces NAME, a service that others call listens on the
  # address of its machine, and the broker is on the machine of the consumer.
  def in_vms(settings, services, ips)
    called = services.select { |service| services.any? { |caller| caller.calls.include?(service.name) } }
    hosts = called.to_h { |service| ["#{service.name.upcase}_HOST", ips[service.machine]] }
    consumer = services.find { |service| service.broker == "consume" }
    hosts["RABBITMQ_HOST"] = ips[consumer.machine] if consumer
    of_services = settings.filter_map do |name, value|
      [name.delete_prefix("VM_"), value] if name.start_with?("VM_") && !name.match?(/_(IP|MEMORY_MB)\z/)
    end
    settings.merge(hosts, of_services.to_h)
  end

  # The names of the settings that a machine with these services gets.
  def needed(own, services, names)
    callees = own.flat_map(&:calls).uniq.map { |name| "#{name.upcase}_(HOST|PORT|INTERNAL_PORT)" }
    patterns = [COMMON, "VM_.*_IP", *own.map { |service| "#{service.name.upcase}_.*" }, *callees]
    patterns << BROKER if own.any?(&:broker)
    if own.any? { |service| service.broker == "consume" }
      # Its RabbitMQ has a login for each service that uses it.
      patterns << BROKER_SERVER
      patterns += services.select(&:broker).map { |service| "#{service.name.upcase}_RABBITMQ_(USER|PASSWORD|EXCHANGE)" }
    end
    pattern = /\A(#{patterns.join("|")})\z/
    names.select { |name| name.match?(pattern) }
  end

  # Lines NAME=value, by the same rule as provision/lib/env.sh. No line is shown: it may hold a password.
  def read_settings(file)
    lines(file).each_with_object({}) do |(line, number), settings|
      next if line.start_with?("#") || line.b.delete(" \t").empty?
      name, value = line.match(/\A([A-Za-z_][A-Za-z0-9_]*)=(.*)\z/)&.captures if line.valid_encoding?
      raise Error, "#{file}: line #{number} is not NAME=value" unless name
      raise Error, "#{file}: line #{number} sets #{name} again" if settings.key?(name)
      settings[name] = value
    end
  end

  # The scripts check the table by the rules of provision/lib/services.sh; here only its form counts.
  def read_services(file)
    lines(file).filter_map do |line, number|
      columns = line.split
      next if columns.empty? || columns.first.start_with?("#")
      raise Error, "#{file}, line #{number}: #{columns.size} columns instead of 5" unless columns.size == 5
      name, machine, database, broker, calls = columns.map { |column| column unless column == "-" }
      Service.new(name, machine, database, broker, (calls || "").split(","))
    end
  end

  # Each line without its end, and its number.
  def lines(file)
    text = File.binread(file).force_encoding(Encoding::UTF_8)
    raise Error, "#{file}: line 1 begins with a byte order mark" if text.start_with?("\uFEFF")
    text.each_line.with_index(1).map { |line, number| [line.chomp, number] }
  end

  def fetch(settings, name)
    settings.fetch(name) { raise Error, "#{name} is not in .env" }
  end
end

if $PROGRAM_NAME == __FILE__
  Machines.all(File.expand_path("../..", __dir__)).each do |machine|
    puts "#{machine.name} #{machine.ip} #{machine.memory_mb} MB: #{machine.services.map(&:name).join(" ")}"
    machine.settings.each { |name, value| puts "  #{name}#{"=#{value}" unless name.match?(/(PASSWORD|SECRETS|KEYS)\z/)}" }
  end
end
